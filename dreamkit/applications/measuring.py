"""Measuring teacher and students side by side: what every application reports."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.types import Images, RunContext


def measure_quality(
    context: RunContext, name: str, model: nn.Module, dreams: Images | None
) -> None:
    """Add ``<name>.accuracy`` on the evaluation images, ``<name>.agreement`` on the dreams.

    Agreement is how often the model predicts the teacher's class; it needs no real data.
    """
    card, device = context.teacher.card, context.device
    if context.evaluation is not None:
        context.metrics[f"{name}.accuracy"] = accuracy(model, context.evaluation, card, device)
    if dreams is not None and name != "teacher":
        agreed = agreement(model, context.teacher.model, dreams, card, device)
        context.metrics[f"{name}.agreement"] = agreed


def measure_cost(context: RunContext, models: Mapping[str, nn.Module]) -> None:
    """Add ``<name>.params``, ``.flops`` and ``.latency_ms``; latencies are timed in turn."""
    size = context.teacher.card.input_size
    for name, model in models.items():
        cost = count(model, size)
        context.metrics[f"{name}.params"] = cost.params
        context.metrics[f"{name}.flops"] = cost.flops
        if cost.uncounted:
            context.details.setdefault("flops_uncounted", {})[name] = cost.uncounted
    home = context.device
    example = torch.zeros(context.latency.batch_size, *size)
    try:
        pairs = [(model.cpu(), example) for model in models.values()]
        timings = context.latency.time(pairs)
    finally:
        for model in models.values():
            model.to(home)
    for name, timing in zip(models, timings, strict=True):
        context.metrics[f"{name}.latency_ms"] = timing.median_ms
        context.metrics[f"{name}.latency_spread_ms"] = timing.spread_ms
    context.details["latency_target"] = context.latency.describe()
