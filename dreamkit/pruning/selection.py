"""How far each group may be pruned, and the greedy choice of what goes next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.errors import TeacherMismatch, did_you_mean
from dreamkit.types import ChannelGroup, Chunk, Saved, Selection, SelectionStep
from dreamkit.wording import and_more

_LEAST_CHUNKS = 4
"""That a group has where nothing else is asked for: of fewer there is little to choose from."""


@dataclass(frozen=True)
class LayerLimits:
    """Limits of the groups that have some layers.

    Args:
        layers: names with ``*``, e.g. ``layer4.*``; a group is meant if one of the layers that
            make its channels is.
        max_ratio: share of a group's original channels that may go; 0 leaves it alone, null is as
            for all other groups.
        min_channels: never fewer than these are left; null is as for all other groups.
    """

    layers: str
    max_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    min_channels: Annotated[int, Field(ge=1)] | None = None

    def mean(self, group: ChannelGroup) -> bool:
        """Whether a group is meant."""
        return self.mean_any(member.layer for member in group.members if member.axis == "out")

    def mean_any(self, makers: Iterable[str]) -> bool:
        """Whether one of some layers is meant, each of which makes channels."""
        return any(fnmatchcase(layer, self.layers) for layer in makers)


@dataclass(frozen=True)
class Limits:
    """How far the pruning of each group may go.

    Args:
        chunk: channels of a group that go together; what is left of a group that is pruned is a
            multiple of it (8, 16 or 32 suit most hardware). ``auto``: 1, or the multiple that the
            kernels of the latency backend like, as INT8's do, halved in groups that have fewer than
            four times as many.
        max_ratio: share of a group's original channels that may go.
        min_channels: never fewer than these are left.
        exceptions: other limits for some layers; the first that means a group counts, and what it
            leaves out is as for all other groups.
    """

    chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_channels: Annotated[int, Field(ge=1)] = 2
    exceptions: tuple[LayerLimits, ...] = ()

    def exception(self, group: ChannelGroup) -> LayerLimits | None:
        """Return the exception that counts for a group, if one means it."""
        return next((e for e in self.exceptions if e.mean(group)), None)

    def floor(self, group: ChannelGroup, original: int) -> int:
        """Return how many channels of a group must stay."""
        own = self.exception(group)
        ratio, least = self.max_ratio, self.min_channels
        if own is not None:
            ratio = ratio if own.max_ratio is None else own.max_ratio
            least = least if own.min_channels is None else own.min_channels
        return max(least, original - int(original * ratio + 1e-9))

    def hold(self, layer: str) -> bool:
        """Whether an exception says how much of a layer may go: then it does not go whole."""
        own = next((e for e in self.exceptions if e.mean_any([layer])), None)
        return own is not None and (own.max_ratio is not None or own.min_channels is not None)

    def check(self, makers: Sequence[str]) -> None:
        """Refuse exceptions that mean nothing of a network.

        Args:
            makers: its layers that make channels, and whatever groups are named for that are left
                alone.

        Raises:
            TeacherMismatch: an exception means none of them.
        """
        for number, exception in enumerate(self.exceptions):
            if exception.mean_any(makers):
                continue
            parts = [layer.split(".") for layer in makers]
            blocks = [".".join([*p[:n], "*"]) for p in parts for n in range(1, len(p))]
            hint = did_you_mean(exception.layers, [*makers, *blocks])
            raise TeacherMismatch(
                f"no layer that makes channels fits '{exception.layers}'{hint} "
                f"(layers: {and_more(makers)})",
                ("exceptions", number, "layers"),
            )

    def chunk_of(self, original: int, multiple: int = 1) -> int:
        """Return how many channels go together.

        Args:
            original: channels of the group before any pruning.
            multiple: that the target's kernels like.
        """
        if self.chunk != "auto":
            return self.chunk
        while multiple > 1 and _LEAST_CHUNKS * multiple > original:
            multiple //= 2
        return multiple

    def chunks(self, group: ChannelGroup, original: int, multiple: int = 1) -> list[int]:
        """Return the sizes of the chunks of a group that may go, one after the other.

        Args:
            group: as it is.
            original: its channels before any pruning.
            multiple: that the target's kernels like.
        """
        now, floor = group.channels, self.floor(group, original)
        chunk, sizes = self.chunk_of(original, multiple), []
        while (left := (now - 1) // chunk * chunk) >= max(floor, 1):
            sizes.append(now - left)
            now = left
        return sizes


def removable(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    originals: Mapping[str, int],
    limits: Limits,
    multiple: int = 1,
) -> list[list[Chunk]]:
    """Return each group's chunks that may go, the least important first.

    Args:
        groups: what can be removed.
        scores: for each group (channels,).
        originals: channels of each group before any pruning, by name.
        limits: floors and chunk.
        multiple: that the target's kernels like.
    """
    found = []
    for group, score in zip(groups, scores, strict=True):
        order = torch.argsort(score, stable=True)
        chunks, first = [], 0
        for size in limits.chunks(group, originals[group.name], multiple):
            taken = order[first : first + size]
            chunks.append(Chunk(group, taken.tolist(), float(score[taken].double().sum())))
            first += size
        found.append(chunks)
    return found


def choose(
    chunks: Sequence[Sequence[Chunk]],
    channels: int,
    enough: Callable[[Chunk], bool] = lambda chunk: False,
) -> dict[str, list[int]]:
    """Choose about ``channels`` channels, the lowest mean score of a chunk first.

    Args:
        chunks: from ``removable``.
        channels: how many to choose; at least one chunk is chosen where any may go.
        enough: told of every chunk that is chosen; whether no more are wanted.

    Returns:
        The channels to remove of each group, by name; empty where there are no chunks.
    """
    chosen: dict[str, list[int]] = {}
    taken = 0
    # Within a group later chunks score no lower, so they never come before an earlier one.
    ordered = sorted(itertools.chain(*chunks), key=lambda chunk: chunk.importance)
    for chunk in ordered:
        if taken and taken + len(chunk.channels) > channels:
            break
        chosen.setdefault(chunk.group.name, []).extend(chunk.channels)
        taken += len(chunk.channels)
        if enough(chunk):
            break
    return chosen


def savings(chunks: Sequence[Sequence[Chunk]], saved: Saved) -> list[list[float]]:
    """Return what each chunk of each group saves once those of its group before it are gone."""
    found = []
    for group in chunks:
        gone = itertools.accumulate(len(chunk.channels) for chunk in group)
        totals = [saved(chunk.group, channels) for chunk, channels in zip(group, gone, strict=True)]
        found.append([after - before for before, after in itertools.pairwise([0.0, *totals])])
    return found


def from_zero(chunks: Sequence[Sequence[Chunk]]) -> list[list[float]]:
    """Return chunks' scores, all raised by as much a channel where the least is below 0.

    Where a score is below 0, to take more seems better than less: of two chunks that are as
    unimportant, the one that saves less would go before the other, and both where one is enough.
    """
    least = min((chunk.importance for chunk in itertools.chain(*chunks)), default=0.0)
    lift = max(0.0, -least)
    return [[(chunk.importance + lift) * len(chunk.channels) for chunk in c] for c in chunks]


@dataclass
class _Block:
    """Chunks of a group that go one after the other: their score, >= 0, and what they save."""

    chunks: list[Chunk]
    score: float
    saved: list[float]

    @property
    def per_cost(self) -> float:
        cost = sum(self.saved)
        return self.score / cost if cost > 0 else math.inf


def _bargains(
    group: Sequence[Chunk], scores: Sequence[float], saved: Sequence[list[float]]
) -> list[_Block]:
    """Return a group's chunks in blocks of which none is a better bargain than the one before."""
    blocks: list[_Block] = []
    for chunk, score, shares in zip(group, scores, saved, strict=True):
        blocks.append(_Block([chunk], score, shares))
        while len(blocks) > 1 and blocks[-1].per_cost < blocks[-2].per_cost:
            last, before = blocks.pop(), blocks.pop()
            both = [a + b for a, b in zip(before.saved, last.saved, strict=True)]
            blocks.append(_Block(before.chunks + last.chunks, before.score + last.score, both))
    return blocks


def choose_by_cost(
    chunks: Sequence[Sequence[Chunk]], needs: Sequence[tuple[Saved, float]]
) -> dict[str, list[int]]:
    """Choose chunks of the lowest score for what they save, until enough is saved.

    A chunk that saves little by itself, as latencies go in steps, is joined with those after it
    where they are the better bargain together.

    Args:
        chunks: from ``removable``.
        needs: what channels save of something, and how much of it, above 0, is to be saved. What
            saves of several things counts by its shares of what is needed of each.

    Returns:
        The channels to remove of each group, by name; all where they do not save enough.
    """
    amounts = [savings(chunks, saved) for saved, _ in needs]
    scores = from_zero(chunks)
    blocks: list[_Block] = []
    for place, group in enumerate(chunks):
        pairs = [(of_all[place], need) for of_all, (_, need) in zip(amounts, needs, strict=True)]
        shares = [[saved[n] / need for saved, need in pairs] for n in range(len(group))]
        blocks += _bargains(group, scores[place], shares)
    chosen: dict[str, list[int]] = {}
    saved = [0.0] * len(needs)
    for block in sorted(blocks, key=lambda block: block.per_cost):
        for chunk in block.chunks:
            chosen.setdefault(chunk.group.name, []).extend(chunk.channels)
        saved = [before + more for before, more in zip(saved, block.saved, strict=True)]
        if min(saved, default=1.0) >= 1:
            break
    return chosen


@dataclass(frozen=True)
class Greedy(Selection):
    """The lowest importance first, until as much is chosen as may go in a round.

    DeepInversion (Yin et al., CVPR 2020), section 4.3, takes the importance of each channel.

    Args:
        per: ``channel``, the mean importance of a chunk's channels (the paper), or ``cost``, the
            importance for what the chunk saves of the target: FLOPs, parameters, channels or
            milliseconds. Of several goals each counts by what is lacking of it.
    """

    per: Literal["channel", "cost"] = "channel"

    def __call__(self, step: SelectionStep) -> dict[str, list[int]]:
        """Return the channels to remove of each group, by name."""
        if self.per == "cost":
            return choose_by_cost(step.chunks, step.shortfall())
        return choose(step.chunks, step.channels, step.enough)
