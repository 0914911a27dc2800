"""What removing a part of each channel group, and of no other, does to a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.pruning.graph import BeforeRemoval, ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import Limits
from dreamkit.stages.comparing import Comparing
from dreamkit.training.batches import NormalisedBatches
from dreamkit.types import ChannelGroup, Images, RunContext, Teacher

TakeStatistics = Callable[[nn.Module, PruningRecord], None]
"""Gives BatchNorm of a network that lacks what a record says the statistics it is to have."""

_BATCH = 64
_EXACT = 1e-6
"""By how much an agreement may be off: it is a float32."""


@dataclass(frozen=True)
class Sensitivity:
    """A pass before anything is cut: what removing shares of each group does.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2, look at layers one
    by one in this way; there are no labels here, so the teacher's own outputs take their place.

    Args:
        shares: of a group's channels that are removed on trial, the least important first.
        images: that agreement with the teacher is measured on, of those that are held back;
            BatchNorm's statistics are taken over about as many.
        max_drop: share of agreement that a group may lose by itself, of what the untouched network
            has with such statistics: ``limits`` then let no more of it go than was tried and lost
            no more, except where ``exceptions`` say how much may. null leaves the limits as they
            are.
    """

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.3, 0.5)
    images: Annotated[int, Field(ge=2)] = 64
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise ValueError("shares: give at least one, each more than the one before")


def _part(channels: int, share: float) -> int:
    """Return how many channels of a group a share is: one at the least, and one stays."""
    return min(channels - 1, max(1, round(share * channels)))


@dataclass(frozen=True)
class Narrowed(Limits):
    """Limits by which no more goes than was found to be harmless.

    Args:
        harmless: how many of its original channels a group may lose, by its name. Where an
            exception says how much of the group may go, that counts.
    """

    harmless: Mapping[str, int] = field(default_factory=dict)

    def floor(self, group: ChannelGroup, original: int) -> int:
        """Return how many channels of a group must stay."""
        floor, own = super().floor(group, original), self.exception(group)
        if own is not None and own.max_ratio is not None:
            return floor
        return max(floor, original - self.harmless.get(group.name, original))


@dataclass(frozen=True)
class Measured:
    """What the pass found, by group; lists go along ``shares``.

    Args:
        shares: of the channels that were removed.
        agreement: how often the network still predicts the teacher's class, in [0, 1].
        divergence: mean KL(p_T ‖ p) of the outputs, in nats.
        whole_agreement: that of the network with all channels, its statistics taken in the same
            way: 1 by difference, and less where they are taken anew on dreams.
        whole_divergence: likewise.
    """

    shares: tuple[float, ...]
    agreement: Mapping[str, Sequence[float]]
    divergence: Mapping[str, Sequence[float]]
    whole_agreement: float = 1.0
    whole_divergence: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-safe data."""
        return {
            "shares": list(self.shares),
            "agreement": {name: list(found) for name, found in self.agreement.items()},
            "divergence": {name: list(found) for name, found in self.divergence.items()},
            "whole_agreement": self.whole_agreement,
            "whole_divergence": self.whole_divergence,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measured:
        """Read what ``to_json`` wrote."""
        return Measured(**{**data, "shares": tuple(data["shares"])})

    def narrowed(self, limits: Limits, max_drop: float, originals: Mapping[str, int]) -> Narrowed:
        """Return limits by which no more of a group goes than lost so much agreement by itself.

        Args:
            limits: as they were; what their exceptions say of how much may go counts.
            max_drop: share of agreement.
            originals: channels of each group before any pruning, by name.
        """
        harmless, least = {}, self.whole_agreement - max_drop - _EXACT
        for name, agreement in self.agreement.items():
            pairs = zip(self.shares, agreement, strict=True)
            tried = itertools.takewhile(lambda pair: pair[1] >= least, pairs)
            harmless[name] = max((_part(originals[name], share) for share, _ in tried), default=0)
        return Narrowed(**vars(limits), harmless=harmless)

    def importances(
        self, scores: Mapping[str, Tensor], originals: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return importances that add up to the divergences measured, in the order of others.

        What the divergence rises by over the channels removed is made convex (its lower hull), as
        those that matter least go first. Beyond the last share nothing was tried, and what is left
        of a group is ever more of what it does: there each channel costs more than the one before
        it by as much as they grew dearer over the last share.

        Args:
            scores: what tells the order, (channels,) of each group, by name.
            originals: channels of each group before any pruning.

        Returns:
            Importances > 0, (channels,) float64 of each group, by name; a group's sum over the
            channels that would go is what that costs, so those of all groups compare.
        """
        found = {}
        for name, score in scores.items():
            total = originals[name]
            removed = [_part(total, share) for share in self.shares]
            measured = {0: self.whole_divergence}
            measured |= zip(removed, self.divergence[name], strict=True)
            hull = _lower_hull(list(measured), list(measured.values()))
            gone = total - len(score)
            heights = [_at(hull, gone + n) for n in range(len(score) + 1)]
            rises = torch.tensor(heights, dtype=torch.float64).diff().clamp_min(0)
            order = torch.argsort(score, stable=True)
            importance = torch.empty(len(score), dtype=torch.float64)
            # Where the slope is one, the order stays that of the scores.
            tilt = 1 + 1e-4 * torch.arange(len(score), dtype=torch.float64) / max(1, len(score))
            importance[order] = (rises.cummax(0).values + 1e-12) * tilt
            found[name] = importance
        return found


def measure_sensitivity(
    graph: ChannelGraph,
    teacher: Teacher,
    scores: Mapping[str, Tensor],
    options: Sensitivity,
    images: Images,
    make_up: BeforeRemoval,
    take_statistics: TakeStatistics,
    context: RunContext,
) -> Measured:
    """Remove shares of each group from copies of a network, and look at what these predict.

    Args:
        graph: of the network as it is, which computes what its teacher does.
        teacher: that is agreed with.
        scores: importances (channels,) of the groups that are looked at, by name.
        options: how.
        images: stored; all of them are looked at.
        make_up: what is done to the weights before a removal.
        take_statistics: what is done to BatchNorm after it.
        context: the run's.

    Returns:
        What was found; the same on every rank.
    """
    batches = NormalisedBatches(images, teacher.card, context.device, _BATCH)
    compared = Comparing(teacher.model, batches)
    trials: list[tuple[str | None, float]] = [(None, 0.0)]  # the network as it is
    trials += itertools.product(scores, options.shares)
    found: dict[tuple[str | None, float], tuple[float, float]] = {}
    with context.log.progress("sensitivity", len(trials)) as advance:
        # Each rank tries some, and all come as often to where they stop together.
        for first in range(0, len(trials), distributed.size()):
            mine = first + distributed.rank()
            if mine < len(trials):
                name, share = trials[mine]
                gone = {} if name is None else {name: _lowest(scores[name], share)}
                smaller, record = graph.without(gone, make_up)
                take_statistics(smaller, record)
                found[name, share] = compared(smaller)
            advance(min(first + distributed.size(), len(trials)))
            context.log.check(together=True)
    for of_rank in distributed.gather(found):
        found |= of_rank
    agreement, divergence = (
        {name: [found[name, share][which] for share in options.shares] for name in scores}
        for which in (0, 1)
    )
    return Measured(options.shares, agreement, divergence, *found[None, 0.0])


def _lowest(score: Tensor, share: float) -> list[int]:
    """Return a share of a group's channels, the least important first."""
    lowest: list[int] = torch.argsort(score, stable=True)[: _part(len(score), share)].tolist()
    return lowest


def _lower_hull(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull of points, from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) <= (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _at(hull: Sequence[tuple[float, float]], x: float) -> float:
    """Return a hull's height at some place; beyond its end the slope grows on as it grew."""
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    # Slopes are those in the middle of each part; at the first channel there is none.
    slopes = [(0.0, 0.0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        slopes.append(((x0 + x1) / 2, max(0.0, (y1 - y0) / (x1 - x0))))
    (before, low), (last, high) = slopes[-2:]
    growth = (high - low) / (last - before)
    x1, y1 = hull[-1]
    return y1 + (x - x1) * (high + growth * ((x + x1) / 2 - last))
