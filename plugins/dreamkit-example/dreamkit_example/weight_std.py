"""Importance read off the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamkit.plugin import Criterion, PruningStep


@dataclass(frozen=True)
class WeightStd(Criterion):
    """Standard deviation of the weights of each channel's filter, which needs no data and no label.

    A filter of nearly equal weights only averages its input. The (population) deviations of
    filters whose channels are coupled, as in a residual sum, add up.
    """

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return importances >= 0, one tensor (channels,) on the CPU for each group."""
        scores = [torch.zeros(group.channels) for group in step.groups]
        for score, group in zip(scores, step.groups, strict=True):
            for member in group.members:
                layer = step.model.get_submodule(member.layer)
                # BatchNorm is an "out" member too; it has one weight a channel and no filter.
                if member.axis == "out" and isinstance(layer, nn.Conv2d | nn.Linear):
                    score.index_add_(0, member.channel, filter_std(layer.weight)[member.index])
        return scores


def filter_std(weight: Tensor) -> Tensor:
    """Return the deviation of each output channel's weights, (C_out,), of (C_out, ...)."""
    return weight.detach().float().flatten(1).std(dim=1, correction=0).cpu()
