"""Measuring teacher and students side by side: what every application reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.latency.sampling import NOISY, repeated_times
from dreamkit.model_state import device_of
from dreamkit.seeds import stream
from dreamkit.stages.samples import Parts
from dreamkit.training.batches import drawn
from dreamkit.types import LatencyBackend, Outcome, RunContext, Teacher, Timing

Sized = tuple[nn.Module, tuple[int, int, int]]
"""A network and the size (C, H, W) of an image that it takes."""
GLANCED = 512
"""Images that a model is looked at on after a round of pruning: sure to 2 points, as curves are."""


def measure_quality(
    name: str, model: nn.Module, teacher: Teacher, parts: Parts | None, context: RunContext
) -> None:
    """Add ``<name>.accuracy`` on the evaluation images, ``<name>.agreement`` on held-back ones.

    Agreement is how often the model predicts the teacher's class; it needs no real data. On how
    many images, and whether they were held back, stands in the detail ``agreement``. Of dreams that
    are yet to be made too few may be there before the training: then it is left out. Where the
    teacher's accuracy was measured before, ``<name>.accuracy_ratio`` is the model's share of it.

    Args:
        name: ``teacher``, or what the model is called.
        model: on the run's device.
        teacher: that it is compared with.
        parts: images that it was made on, and those held back; None compares nothing.
        context: the run's.
    """
    metrics, device = context.log.metrics, context.device
    if context.evaluation is not None:
        with context.log.progress(f"{name} accuracy", len(context.evaluation)) as advance:
            found = accuracy(model, context.evaluation, teacher.card, device, advance)
        metrics[f"{name}.accuracy"] = found
        if name != "teacher" and metrics.get("teacher.accuracy"):
            metrics[f"{name}.accuracy_ratio"] = found / metrics["teacher.accuracy"]
    if parts is None or name == "teacher" or not parts.tell:
        return
    with context.log.progress(f"{name} agreement", 2 * len(parts.compared)) as advance:
        agreed = agreement(model, teacher.model, parts.compared, teacher.card, device, advance)
    metrics[f"{name}.agreement"] = agreed
    measured_on = {"images": len(parts.compared), "held_out": parts.apart}
    context.log.details.setdefault("agreement", {})[name] = measured_on


def glance(
    model: nn.Module, teacher: Teacher, parts: Parts, context: RunContext, timed: bool = False
) -> dict[str, float]:
    """Look at a model between two rounds: accuracy on a draw of ``GLANCED`` evaluation images.

    Where there are none, agreement with the teacher on as many that are held back.

    Args:
        model: on the run's device.
        teacher: that it is compared with.
        parts: the images that it is made on, and those held back.
        context: the run's.
        timed: whether its latency is told too, in milliseconds.
    """
    card, device, log = teacher.card, context.device, context.log
    found = {}
    if context.evaluation is not None:
        some = drawn(context.evaluation, GLANCED, stream(context.seed, "evaluation"))
        with log.progress("accuracy", len(some)) as advance:
            found["accuracy"] = accuracy(model, some, card, device, advance)
    elif parts.tell:
        some = drawn(parts.compared, GLANCED, stream(context.seed, "agreement"))
        with log.progress("agreement", 2 * len(some)) as advance:
            found["agreement"] = agreement(model, teacher.model, some, card, device, advance)
    if timed:
        with log.progress("timing", 1):
            networks = {"student": (model, card.input_size)}
            (timing,) = time_models(networks, context.latency, log.note).values()
        found["latency_ms"] = timing.median_ms
    return found


def measure_costs(outcome: Outcome, teacher: Teacher, context: RunContext, latency: bool) -> None:
    """Add what a teacher and the student of an application cost.

    Args:
        outcome: with a student.
        teacher: that it is set beside.
        context: the run's.
        latency: whether they are timed, unless the application has done it.
    """
    student, metrics = outcome.student, context.log.metrics
    if student is None:
        return
    networks = {"teacher": sized(teacher), "student": sized(student)}
    measure_size(networks, context)
    if latency and "student.latency_ms" not in metrics:
        measure_latency(networks, context)
    for name in outcome.same_layers:
        for cost in {"params", "flops", "latency_ms"} & {
            key.removeprefix("student.") for key in metrics
        }:
            metrics[f"{name}.{cost}"] = metrics[f"student.{cost}"]


def sized(network: Teacher) -> Sized:
    """Return a network and what it takes."""
    return network.model, network.card.input_size


def measure_size(networks: Mapping[str, Sized], context: RunContext) -> None:
    """Add ``<name>.params`` and ``<name>.flops`` (of one image, a multiply-add counted once)."""
    with context.log.progress("counting FLOPs", len(networks)) as advance:
        costs = {}
        for number, (name, (model, size)) in enumerate(networks.items(), 1):
            costs[name] = count(model, size)
            advance(number)
    for name, cost in costs.items():
        context.log.metrics[f"{name}.params"] = cost.params
        context.log.metrics[f"{name}.flops"] = cost.flops
        if cost.uncounted:
            context.log.details.setdefault("flops_uncounted", {})[name] = cost.uncounted


def measure_latency(networks: Mapping[str, Sized], context: RunContext) -> None:
    """Add ``<name>.latency_ms`` and its spread; the models are timed in turn."""
    metrics = context.log.metrics
    with context.log.progress("timing latencies", 1):
        timings = time_models(networks, context.latency, context.log.note)
    for name, timing in timings.items():
        metrics[f"{name}.latency_ms"] = timing.median_ms
        metrics[f"{name}.latency_spread_ms"] = timing.spread_ms
    context.log.details["latency_target"] = context.latency.describe()
    remarks: dict[str, list[str]] = {}
    with (
        context.log.progress("looking at what is timed", len(networks)) as advance,
        _on_cpu([model for model, _ in networks.values()]),
    ):
        for number, (name, (model, size)) in enumerate(networks.items(), 1):
            example = torch.zeros(context.latency.batch_size, *size)
            if (remark := context.latency.remark(model, example)) is not None:
                remarks.setdefault(remark, []).append(name)
            advance(number)
    for remark, names in remarks.items():
        whose = "" if len(names) == len(networks) else f"{', '.join(names)}: "
        context.log.note(whose + remark)


def time_models(
    networks: Mapping[str, Sized],
    backend: LatencyBackend,
    note: Callable[[str], None],
) -> dict[str, Timing]:
    """Time models in turn on the latency target, and again; they end up where they were.

    Args:
        networks: by name.
        backend: that measures.
        note: told where the times of a model do not agree.
    """
    with _on_cpu([model for model, _ in networks.values()]):
        timed = [
            (model, torch.zeros(backend.batch_size, *size)) for model, size in networks.values()
        ]
        timings, disagreement = repeated_times(backend, timed)
    if disagreement > NOISY:
        note(
            f"timing {' and '.join(networks)} three times, even the nearest two differ by "
            f"{disagreement:.0%}: other work keeps the machine busy, and latencies are as unsure"
        )
    return dict(zip(networks, timings, strict=True))


@contextmanager
def _on_cpu(models: Sequence[nn.Module]) -> Iterator[None]:
    """Move models to the CPU, and back to where they were."""
    homes = [device_of(model) for model in models]
    try:
        for model in models:
            model.cpu()
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)
