"""How far each group may be pruned, and the greedy choice of what goes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.types import ChannelGroup


@dataclass(frozen=True)
class LayerLimits:
    """Limits of the groups that have some layers.

    Args:
        layers: names with ``*``, e.g. ``layer4.*``; a group is meant if one of the layers that
            make its channels is.
        max_ratio: share of a group's original channels that may go; 0 leaves it alone.
        min_channels: never fewer than these are left.
    """

    layers: str
    max_ratio: Annotated[float, Field(ge=0, le=1)] = 0.9
    min_channels: Annotated[int, Field(ge=1)] = 2

    def mean(self, group: ChannelGroup) -> bool:
        """Whether a group is meant."""
        makers = (member.layer for member in group.members if member.axis == "out")
        return any(fnmatchcase(layer, self.layers) for layer in makers)


@dataclass(frozen=True)
class Limits:
    """How far the pruning of each group may go.

    Args:
        chunk: channels of a group that go together; what is left of a group that is pruned is a
            multiple of it (8, 16 or 32 suit most hardware).
        max_ratio: share of a group's original channels that may go.
        min_channels: never fewer than these are left.
        exceptions: other limits for some layers; the first that means a group counts.
    """

    chunk: Annotated[int, Field(ge=1)] = 1
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_channels: Annotated[int, Field(ge=1)] = 2
    exceptions: tuple[LayerLimits, ...] = ()

    def floor(self, group: ChannelGroup, original: int) -> int:
        """Return how many channels of a group must stay."""
        own = next((e for e in self.exceptions if e.mean(group)), self)
        return max(own.min_channels, original - int(original * own.max_ratio + 1e-9))

    def chunks(self, group: ChannelGroup, original: int) -> list[int]:
        """Return the sizes of the chunks of a group that may go, one after the other."""
        now, floor = group.channels, self.floor(group, original)
        sizes = []
        while (left := (now - 1) // self.chunk * self.chunk) >= max(floor, 1):
            sizes.append(now - left)
            now = left
        return sizes


@dataclass(frozen=True)
class Chunk:
    """Channels of a group that go together, after those chunks of it that score lower.

    Args:
        group: whose they are.
        channels: which.
        score: the sum of their importances.
    """

    group: ChannelGroup
    channels: list[int]
    score: float


def removable(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    originals: Mapping[str, int],
    limits: Limits,
) -> list[list[Chunk]]:
    """Return each group's chunks that may go, the least important first.

    Args:
        groups: what can be removed.
        scores: for each group (channels,).
        originals: channels of each group before any pruning, by name.
        limits: floors and chunk.
    """
    found = []
    for group, score in zip(groups, scores, strict=True):
        order = torch.argsort(score, stable=True)
        chunks, first = [], 0
        for size in limits.chunks(group, originals[group.name]):
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
    ordered = sorted(
        (chunk for group in chunks for chunk in group),
        key=lambda chunk: chunk.score / len(chunk.channels),
    )
    for chunk in ordered:
        if taken and taken + len(chunk.channels) > channels:
            break
        chosen.setdefault(chunk.group.name, []).extend(chunk.channels)
        taken += len(chunk.channels)
        if enough(chunk):
            break
    return chosen
