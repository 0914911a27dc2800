"""Importance of channels: the weighted sum of a recipe's criteria (DeepInversion, eq. 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dreamkit.errors import placed
from dreamkit.flat_state import below, prefixed
from dreamkit.registry import Term
from dreamkit.types import ChannelGroup, Criterion, PruningStep

Normalise = Literal["mean", "max", "group", "none"]


class Ranking:
    """The criteria of a pruning run, and what each of them said of the channels still there.

    Args:
        criteria: the weighted terms.
        normalise: what a criterion's values are divided by before they are added: the ``mean`` or
            the ``max`` of their absolute values over all channels, the mean within each
            ``group``, or ``none``.
    """

    def __init__(self, criteria: Sequence[Term[Criterion]], normalise: Normalise) -> None:
        self.criteria = criteria
        self.normalise = normalise
        self.earlier: list[dict[str, Tensor]] = [{} for _ in criteria]

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Let criteria refuse what they cannot score, before anything is dreamed.

        Args:
            model: to be pruned.
            groups: of it, from which channels may go.

        Raises:
            DreamkitError: one refuses, placed at its term.
        """
        for number, term in enumerate(self.criteria):
            with placed("criteria", number):
                term.entry.check(model, groups)

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return the importance of each group's channels, (channels,) each."""
        total = [torch.zeros(group.channels) for group in step.groups]
        for term, earlier in zip(self.criteria, self.earlier, strict=True):
            known = [earlier[group.name] for group in step.groups] if earlier else None
            scores = [score.cpu() for score in term.entry(dataclasses.replace(step, earlier=known))]
            earlier |= {g.name: score for g, score in zip(step.groups, scores, strict=True)}
            for sum_, score in zip(total, self._normalised(scores), strict=True):
                sum_ += term.weight * score
        return total

    def _normalised(self, scores: Sequence[Tensor]) -> list[Tensor]:
        if self.normalise == "group":
            return [score / (float(score.abs().mean()) or 1.0) for score in scores]
        scale = 1.0
        if self.normalise != "none":
            size = torch.cat(list(scores)).abs()
            scale = float(size.mean() if self.normalise == "mean" else size.max()) or 1.0
        return [score / scale for score in scores]

    def forget(self, removed: Mapping[str, Sequence[int]]) -> None:
        """Drop what was said of channels that are gone, by group."""
        self.earlier = [without(earlier, removed) for earlier in self.earlier]

    def state(self) -> dict[str, Tensor]:
        """Return what was said, as a flat dictionary of tensors."""
        state: dict[str, Tensor] = {}
        for number, earlier in enumerate(self.earlier):
            state |= prefixed(str(number), earlier)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.earlier = [below(str(number), state) for number in range(len(self.criteria))]


def without(
    scores: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return scores (channels,) of groups, by name, of the channels that are not removed."""
    found = dict(scores)
    for name in scores.keys() & removed.keys():
        stays = torch.ones(len(scores[name]), dtype=torch.bool)
        stays[list(removed[name])] = False
        found[name] = scores[name][stays]
    return found
