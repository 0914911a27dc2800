"""Measuring teacher and students side by side: what every application reports."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.training.batches import drawn
from dreamkit.types import Images, RunContext, Timing

COMPARED = 8192
"""Dreams on which a model is compared with its teacher at the most: half a percent of doubt."""


def measure_quality(
    context: RunContext, name: str, model: nn.Module, dreams: Images | None
) -> None:
    """Add ``<name>.accuracy`` on the evaluation images, ``<name>.agreement`` on the dreams.

    Agreement is how often the model predicts the teacher's class; it needs no real data. Of many
    dreams it is that on a draw of ``COMPARED``, the same for all models on these dreams. Where the
    teacher's accuracy was measured before, ``<name>.accuracy_ratio`` is the model's share of it.
    """
    card, device = context.teacher.card, context.device
    if context.evaluation is not None:
        found = accuracy(model, context.evaluation, card, device)
        context.metrics[f"{name}.accuracy"] = found
        if name != "teacher" and context.metrics.get("teacher.accuracy"):
            context.metrics[f"{name}.accuracy_ratio"] = found / context.metrics["teacher.accuracy"]
    if dreams is not None and name != "teacher":
        sample = drawn(dreams, COMPARED, torch.Generator().manual_seed(context.seed))
        agreed = agreement(model, context.teacher.model, sample, card, device)
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
    for name, timing in time_models(context, models).items():
        context.metrics[f"{name}.latency_ms"] = timing.median_ms
        context.metrics[f"{name}.latency_spread_ms"] = timing.spread_ms
    context.details["latency_target"] = context.latency.describe()


def time_models(context: RunContext, models: Mapping[str, nn.Module]) -> dict[str, Timing]:
    """Time models in turn on the run's latency target; they end up where they were."""
    home = context.device
    example = torch.zeros(context.latency.batch_size, *context.teacher.card.input_size)
    try:
        pairs = [(model.cpu(), example) for model in models.values()]
        timings = context.latency.time(pairs)
    finally:
        for model in models.values():
            model.to(home)
    return dict(zip(models, timings, strict=True))
