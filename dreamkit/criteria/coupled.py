"""Scores of the layers that make a group's channels, brought together to one score a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dreamkit.errors import NothingToPrune
from dreamkit.types import ChannelGroup

Reduction = Literal["sum", "mean", "max"]


def coupled_scores(
    model: nn.Module,
    group: ChannelGroup,
    score: Callable[[nn.Module], Tensor | None],
    reduction: Reduction,
    lacking: str,
) -> Tensor:
    """Return one score a channel of a group, (channels,) on the CPU.

    Args:
        model: whose layers they are.
        group: channels that can only be removed together.
        score: of a layer's output channels (C,); None for layers that do not count.
        reduction: how the scores of coupled layers become one.
        lacking: what the group has none of if no layer counts, for the message.

    Raises:
        NothingToPrune: no layer of the group counts.
    """
    rows = []
    for member in group.members:
        found = score(model.get_submodule(member.layer)) if member.axis == "out" else None
        if found is not None:
            row = torch.zeros(group.channels)
            rows.append(row.index_add_(0, member.channel, found.detach().cpu()[member.index]))
    if not rows:
        raise NothingToPrune(f"the channel group {group.name} has no {lacking}", ("criteria",))
    scores = torch.stack(rows)
    if reduction == "max":
        return scores.amax(0)
    return scores.sum(0) if reduction == "sum" else scores.mean(0)


def filters(layer: nn.Module) -> Tensor | None:
    """Return a convolution's or linear layer's weights, one row an output channel."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return layer.weight.detach().float().flatten(1)
    return None
