"""Channels that go together, and what criteria see of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.types.latency import LatencyTable, LayerShape


@dataclass(frozen=True)
class Member:
    """A layer's share in a channel group.

    ``index[i]`` is the layer's channel that belongs to the group's channel ``channel[i]``.
    """

    layer: str
    axis: str  # "out", "in", "parameter", or "attribute:NAME" for a number that a module keeps
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, e.g. those that meet in a residual sum."""

    name: str
    channels: int
    members: tuple[Member, ...]

    def shapes_without(
        self, shapes: Mapping[str, LayerShape], channels: int
    ) -> dict[str, LayerShape]:
        """Return what becomes of this group's layers once some of its channels are gone.

        Args:
            shapes: by name, of the model's convolutions and linear layers.
            channels: how many go.
        """
        after: dict[str, LayerShape] = {}
        for member in self.members:
            if member.layer in shapes:
                # A flattened feature map gives a linear layer several inputs for each channel.
                gone = round(channels * len(member.index) / self.channels)
                shape = after.get(member.layer, shapes[member.layer])
                after[member.layer] = shape.without(member.axis, gone)
        return after


@dataclass(frozen=True)
class PruningStep:
    """The state of a pruning run, as criteria see it before each removal.

    Args:
        model: the model being pruned.
        teacher: the model it started from, in eval mode.
        groups: what may be removed; those that the limits leave alone from the start are not there.
        card: the teacher's card.
        chunks: of each group, how many channels may go together, one lot after the other.
        device: where the model is.
        batches: yields normalised images (N, C, H, W) and labels (N,), a fixed few batches.
        latency: times modules on the target.
        generator: for anything random in a criterion.
        earlier: what the same criterion said of these channels the step before; None at first.
    """

    model: nn.Module
    teacher: nn.Module
    groups: Sequence[ChannelGroup]
    card: Card
    chunks: Sequence[Sequence[int]]
    device: torch.device
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    latency: LatencyTable
    generator: torch.Generator
    earlier: Sequence[Tensor] | None = None


class Criterion(ABC):
    """An entry of ``criteria``: how important channels are."""

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse channel groups that it cannot score, before anything is dreamed.

        Raises:
            NothingToPrune: there are such groups; the message names them.
        """

    @abstractmethod
    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return for each group its channels' importance (channels,); the lowest go first."""


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

    @property
    def importance(self) -> float:
        """The mean over its channels, by which chunks of different sizes compare."""
        return self.score / len(self.channels)


Saved = Callable[[ChannelGroup, int], float]
"""What taking some channels of a group, and no others, saves."""


@dataclass(frozen=True)
class SelectionStep:
    """What may go in one round of pruning, and how much of it has to.

    Args:
        chunks: of each group, in the order in which they may go: the least important first.
        channels: how many may go in this round, at the most.
        enough: told of every chunk that is taken, in turn; whether the target is met by that.
        shortfall: returns, for each goal, what channels save of it, and how much of it, above 0,
            this round has to save. It may take measurements, so call it only where it is used.
        note: told what the user must know.
    """

    chunks: Sequence[Sequence[Chunk]]
    channels: int
    enough: Callable[[Chunk], bool]
    shortfall: Callable[[], Sequence[tuple[Saved, float]]]
    note: Callable[[str], None]


class Selection(ABC):
    """An entry of ``selections``: which channels go in a round of pruning."""

    @abstractmethod
    def __call__(self, step: SelectionStep) -> dict[str, list[int]]:
        """Return the channels to remove of each group, by name; empty if the target is too far.

        Of a group, no chunk goes before an earlier one.
        """
