"""Scores of the layers that make a group's channels, brought together to one score a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dreamkit.errors import NothingToPrune
from dreamkit.types import ChannelGroup
from dreamkit.wording import and_more

Reduction = Literal["sum", "mean", "max"]


def check_makers(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    counts: Callable[[nn.Module], object | None],
    lacking: str,
    instead: str = "use taylor, or ",
) -> None:
    """Refuse channel groups that a criterion cannot score.

    Args:
        model: whose channels they are.
        groups: from which channels may go.
        counts: of a layer, None if it tells nothing of the channels that it makes.
        lacking: what a group has none of if no layer counts, for the message.
        instead: what to do about it, beside leaving the groups alone.

    Raises:
        NothingToPrune: no layer of some group counts; the message names such groups.
    """
    without = [
        group
        for group in groups
        if all(counts(model.get_submodule(layer)) is None for layer in _makers(group))
    ]
    refuse_groups(without, lacking, instead)


def refuse_groups(
    groups: Sequence[ChannelGroup], lacking: str, instead: str = "use taylor, or "
) -> None:
    """Refuse some channel groups, if there are any.

    Args:
        groups: that cannot be scored.
        lacking: what they have none of, for the message.
        instead: what to do about it, beside leaving the groups alone.

    Raises:
        NothingToPrune: there are some; the message names them.
    """
    if groups:
        raise NothingToPrune(
            f"there is no {lacking} in the channel groups {and_more([g.name for g in groups])}: "
            f"{instead}leave such groups alone, each by one of limits.exceptions: "
            f"{{layers: {_makers(groups[0])[0]}, max_ratio: 0}}"
        )


def _makers(group: ChannelGroup) -> list[str]:
    return [member.layer for member in group.members if member.axis == "out"]


def coupled_scores(
    model: nn.Module,
    group: ChannelGroup,
    score: Callable[[nn.Module], Tensor | None],
    reduction: Reduction,
) -> Tensor:
    """Return one score a channel of a group, (channels,) on the CPU.

    Args:
        model: whose layers they are.
        group: channels that can only be removed together.
        score: of a layer's output channels (C,); None for layers that do not count, but at least
            one does (``check_makers``).
        reduction: how the scores of coupled layers become one.
    """
    rows = []
    for member in group.members:
        found = score(model.get_submodule(member.layer)) if member.axis == "out" else None
        if found is not None:
            row = torch.zeros(group.channels)
            rows.append(row.index_add_(0, member.channel, found.detach().cpu()[member.index]))
    scores = torch.stack(rows)
    if reduction == "max":
        return scores.amax(0)
    return scores.sum(0) if reduction == "sum" else scores.mean(0)


def filters(layer: nn.Module) -> Tensor | None:
    """Return a convolution's or linear layer's weights, one row an output channel."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return layer.weight.detach().float().flatten(1)
    return None
