"""Checks of what pruning asks: criteria, selections, latency backends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dreamkit.plugin.testing.tiny import (
    CLASSES,
    SIZE,
    expect,
    made,
    tiny_teacher,
    untouched,
    working,
)
from dreamkit.types import (
    ChannelGroup,
    Chunk,
    Criterion,
    LatencyBackend,
    LayerShape,
    Member,
    PruningStep,
    Selection,
    SelectionStep,
    Teacher,
    Timing,
)

_BATCH = 6


def check_criterion(entry: Criterion | type) -> None:
    """Check a criterion: a finite importance of every channel, and the model left as it was.

    Raises:
        ContractError: it is not.
    """
    criterion, name = made("criteria", entry)
    teacher, student, groups = tiny_teacher(), tiny_teacher(seed=1), _groups()
    for parameter in student.model.parameters():
        parameter.requires_grad_(True)
    step = _pruning_step(teacher, student.model, groups)
    with (
        untouched(student.model, name),
        untouched(teacher.model, name),
        working(f"{name} on two groups of channels"),
    ):
        criterion.check(student.model, groups)
        scores = criterion(step)
    expect(
        len(scores) == len(groups), f"{name} returned {len(scores)} scores of {len(groups)} groups"
    )
    for group, score in zip(groups, scores, strict=True):
        expect(isinstance(score, Tensor), f"{name} returned {type(score).__name__}, not a Tensor")
        expect(
            tuple(score.shape) == (group.channels,),
            f"{name} returned shape {tuple(score.shape)} for a group of {group.channels} channels",
        )
        expect(bool(score.isfinite().all()), f"{name} returned a score that is not finite")
        expect(not score.requires_grad, f"{name} returned scores with a gradient: detach them")


def check_selection(entry: Selection | type) -> None:
    """Check a selection: whole chunks of each group, none before an earlier one.

    Raises:
        ContractError: it is not.
    """
    selection, name = made("selections", entry)
    chunks = [
        [Chunk(group, [number], 1.0 + number + extra) for number in range(group.channels - 2)]
        for extra, group in zip((0.0, 0.5), _groups(), strict=True)
    ]
    for offered in (chunks, []):
        step = SelectionStep(
            chunks=offered,
            channels=3,
            enough=lambda chunk: False,
            shortfall=lambda: [(lambda group, gone: float(gone), 3.0)],
            note=lambda text: None,
        )
        with working(f"{name} on {sum(map(len, offered))} chunks"):
            chosen = selection(step)
        expect(isinstance(chosen, dict), f"{name} returned {type(chosen).__name__}, not a dict")
        expect(bool(chosen) == bool(offered), f"{name} chose {chosen or 'nothing'} of {offered}")
        known = {group[0].group.name: group for group in offered}
        for group, channels in chosen.items():
            expect(group in known, f"{name} chose of '{group}', which is no group's name")
            ordered = [channel for chunk in known[group] for channel in chunk.channels]
            expect(
                sorted(channels) == sorted(ordered[: len(channels)]),
                f"{name} chose {channels} of '{group}', where {ordered} may go in this order",
            )


def check_latency_backend(entry: LatencyBackend | type) -> None:
    """Check a latency backend: a positive time for every module, and facts about the target.

    Raises:
        ContractError: it is not.
    """
    backend, name = made("latency_backends", entry)
    expect(
        type(backend.batch_size) is int and backend.batch_size > 0,
        f"{name}.batch_size should be an integer above 0 (got {backend.batch_size!r})",
    )
    expect(
        type(backend.channel_block) is int and backend.channel_block > 0,
        f"{name}.channel_block should be an integer above 0 (got {backend.channel_block!r})",
    )
    expect(
        type(backend.channel_multiple) is int and backend.channel_multiple > 0,
        f"{name}.channel_multiple should be an integer above 0 (got {backend.channel_multiple!r})",
    )
    teacher = tiny_teacher()
    layer = nn.Conv2d(3, 4, 3)
    images = torch.zeros(backend.batch_size, *SIZE)
    with untouched(teacher.model, name), working(f"{name} on a layer and a network"):
        facts = backend.describe()
        timings = backend.time([(layer, images), (teacher.model, images)])
    expect(
        all(isinstance(x, str) for pair in facts.items() for x in pair),
        f"{name}.describe should return words by words (got {facts})",
    )
    expect(len(timings) == 2, f"{name} returned {len(timings)} timings of 2 modules")
    for timing in timings:
        expect(isinstance(timing, Timing), f"{name} returned {timing!r}, not a Timing")
        expect(0 < timing.median_ms < float("inf"), f"{name} measured {timing.median_ms} ms")


class _Table:
    """Tells the latency of a layer by its multiply-adds."""

    block = 1

    def prepare(self, shapes: Iterable[LayerShape]) -> None:
        """Measure nothing."""

    def predict(self, shape: LayerShape) -> float:
        """Return milliseconds."""
        return 1e-3 * (shape.flops + shape.params)

    def shapes(self, model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
        """Return the tiny network's layers."""
        return {
            "stem.0": LayerShape("conv", 3, 6, (3, 3), (1, 1), (1, 1), feature_map=input_size[1:]),
            "body.0": LayerShape("conv", 6, 8, (3, 3), (1, 1), (1, 1), feature_map=input_size[1:]),
            "fc": LayerShape("linear", 8, CLASSES),
        }


def _groups() -> list[ChannelGroup]:
    """Return the channels of the tiny network that may go."""
    found = []
    for maker, channels, taker in (("stem", 6, "body.0"), ("body", 8, "fc")):
        every = torch.arange(channels)
        layers = ((f"{maker}.0", "out"), (f"{maker}.1", "out"), (taker, "in"))
        members = tuple(Member(layer, axis, every, every) for layer, axis in layers)
        found.append(ChannelGroup(maker, channels, members))
    return found


def _pruning_step(teacher: Teacher, model: nn.Module, groups: list[ChannelGroup]) -> PruningStep:
    draws = torch.Generator().manual_seed(0)
    shown = [torch.randn(_BATCH, *SIZE, generator=draws) for _ in range(2)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(shown, itertools.repeat(torch.arange(_BATCH) % CLASSES))

    return PruningStep(
        model=model,
        teacher=teacher.model,
        groups=groups,
        card=teacher.card,
        chunks=[[1] * (group.channels - 2) for group in groups],
        device=torch.device("cpu"),
        batches=batches,
        latency=_Table(),
        generator=torch.Generator().manual_seed(0),
    )
