"""Greedy choice of what to remove next: the least important chunks of all groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.types import ChannelGroup


@dataclass(frozen=True)
class Limits:
    """How far the pruning of each group may go.

    Args:
        chunk: channels of a group that go together; counts stay multiples of it where they were.
        max_ratio: share of a group's original channels that may go.
        min_channels: never fewer than these are left.
    """

    chunk: Annotated[int, Field(ge=1)] = 1
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_channels: Annotated[int, Field(ge=1)] = 2

    def spare(self, original: int, now: int) -> int:
        """Return how many more channels of a group may go, a multiple of the chunk."""
        floor = max(self.min_channels, original - int(original * self.max_ratio + 1e-9))
        return max(0, now - floor) // self.chunk * self.chunk


def choose(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    originals: Mapping[str, int],
    limits: Limits,
    channels: int,
) -> dict[str, list[int]]:
    """Choose about ``channels`` channels, the lowest mean score of a chunk first.

    Args:
        groups: what can be removed.
        scores: for each group (channels,).
        originals: channels of each group before any pruning, by name.
        limits: floors and chunk.
        channels: how many to choose; at least one chunk is chosen where any may go.

    Returns:
        The channels to remove of each group, by name; empty where the limits leave nothing.
    """
    candidates: list[tuple[float, str, list[int]]] = []
    for group, score in zip(groups, scores, strict=True):
        order = torch.argsort(score, stable=True).tolist()
        spare = limits.spare(originals[group.name], group.channels)
        for first in range(0, spare, limits.chunk):
            chunk = order[first : first + limits.chunk]
            candidates.append((float(score[chunk].mean()), group.name, chunk))
    chosen: dict[str, list[int]] = {}
    taken = 0
    # Within a group later chunks score no lower, so they never come before an earlier one.
    for _, name, chunk in sorted(candidates, key=lambda candidate: candidate[0]):
        if taken and taken + len(chunk) > channels:
            break
        chosen.setdefault(name, []).extend(chunk)
        taken += len(chunk)
    return chosen
