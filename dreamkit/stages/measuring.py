"""Measuring teacher and students side by side: what every application reports."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.model_state import device_of
from dreamkit.seeds import stream
from dreamkit.stages.samples import compared_sample
from dreamkit.training.batches import drawn
from dreamkit.types import Images, LatencyBackend, Outcome, RunContext, Teacher, Timing

EVALUATED = 2048
"""Evaluation images that are looked at after every round of pruning."""


def measure_quality(
    name: str, model: nn.Module, teacher: Teacher, images: Images | None, context: RunContext
) -> None:
    """Add ``<name>.accuracy`` on the evaluation images, ``<name>.agreement`` on the dreams.

    Agreement is how often the model predicts the teacher's class; it needs no real data. It is
    that on ``compared_sample``, the same for all models on these dreams: what fits layers or
    statistics is drawn from the rest as far as that goes, and only a training sees all of them.
    Where the teacher's accuracy was measured before, ``<name>.accuracy_ratio`` is the model's share
    of it.

    Args:
        name: ``teacher``, or what the model is called.
        model: on the run's device.
        teacher: that it is compared with.
        images: that it was made on; None compares nothing.
        context: the run's.
    """
    metrics, device = context.log.metrics, context.device
    if context.evaluation is not None:
        with context.log.progress(f"{name} accuracy", len(context.evaluation)) as advance:
            found = accuracy(model, context.evaluation, teacher.card, device, advance)
        metrics[f"{name}.accuracy"] = found
        if name != "teacher" and metrics.get("teacher.accuracy"):
            metrics[f"{name}.accuracy_ratio"] = found / metrics["teacher.accuracy"]
    if images is not None and name != "teacher":
        sample = compared_sample(images, context.seed)
        with context.log.progress(f"{name} agreement", 2 * len(sample)) as advance:
            agreed = agreement(model, teacher.model, sample, teacher.card, device, advance)
        metrics[f"{name}.agreement"] = agreed


def glance(model: nn.Module, teacher: Teacher, context: RunContext) -> dict[str, float]:
    """Return a model's accuracy on a draw of ``EVALUATED`` images; empty where there are none."""
    if context.evaluation is None:
        return {}
    some = drawn(context.evaluation, EVALUATED, stream(context.seed, "evaluation"))
    with context.log.progress("accuracy", len(some)) as advance:
        return {"accuracy": accuracy(model, some, teacher.card, context.device, advance)}


def measure_costs(outcome: Outcome, teacher: Teacher, context: RunContext, latency: bool) -> None:
    """Add what a teacher and the student of an application cost.

    Args:
        outcome: with a student.
        teacher: that it is set beside.
        context: the run's.
        latency: whether they are timed, unless the application has done it.
    """
    student, metrics, size = outcome.student, context.log.metrics, teacher.card.input_size
    if student is None:
        return
    models = {"teacher": teacher.model, "student": student.model}
    measure_size(models, size, context)
    if latency and "student.latency_ms" not in metrics:
        measure_latency(models, size, context)
    for name in outcome.same_layers:
        for cost in {"params", "flops", "latency_ms"} & {
            key.removeprefix("student.") for key in metrics
        }:
            metrics[f"{name}.{cost}"] = metrics[f"student.{cost}"]


def measure_size(
    models: Mapping[str, nn.Module], input_size: tuple[int, int, int], context: RunContext
) -> None:
    """Add ``<name>.params`` and ``<name>.flops`` (of one image, a multiply-add counted once)."""
    with context.log.progress("counting FLOPs", len(models)) as advance:
        costs = {}
        for number, (name, model) in enumerate(models.items(), 1):
            costs[name] = count(model, input_size)
            advance(number)
    for name, cost in costs.items():
        context.log.metrics[f"{name}.params"] = cost.params
        context.log.metrics[f"{name}.flops"] = cost.flops
        if cost.uncounted:
            context.log.details.setdefault("flops_uncounted", {})[name] = cost.uncounted


def measure_latency(
    models: Mapping[str, nn.Module], input_size: tuple[int, int, int], context: RunContext
) -> None:
    """Add ``<name>.latency_ms`` and its spread; the models are timed in turn."""
    metrics = context.log.metrics
    with context.log.progress("timing latencies", 1):
        timings = time_models(models, input_size, context.latency)
    for name, timing in timings.items():
        metrics[f"{name}.latency_ms"] = timing.median_ms
        metrics[f"{name}.latency_spread_ms"] = timing.spread_ms
    context.log.details["latency_target"] = context.latency.describe()


def time_models(
    models: Mapping[str, nn.Module], input_size: tuple[int, int, int], backend: LatencyBackend
) -> dict[str, Timing]:
    """Time models in turn on the latency target; they end up where they were."""
    homes = {name: device_of(model) for name, model in models.items()}
    example = torch.zeros(backend.batch_size, *input_size)
    try:
        timings = backend.time([(model.cpu(), example) for model in models.values()])
    finally:
        for name, model in models.items():
            model.to(homes[name])
    return dict(zip(models, timings, strict=True))
