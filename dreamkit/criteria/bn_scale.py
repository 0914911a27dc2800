"""The scale that BatchNorm gives a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.criteria.coupled import Reduction, check_makers, coupled_scores
from dreamkit.types import ChannelGroup, Criterion, PruningStep


@dataclass(frozen=True)
class BNScale(Criterion):
    """Absolute scale |γ| of the BatchNorm layers behind a channel.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    who train with an l1 penalty on γ; without it the ranking is weaker.

    Args:
        reduction: how the scales of coupled layers become one.
    """

    reduction: Reduction = "sum"

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse groups without BatchNorm.

        Raises:
            NothingToPrune: there are some.
        """
        check_makers(model, groups, _scale, "BatchNorm with a scale")

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return scales >= 0, one tensor (channels,) for each group."""
        return [coupled_scores(step.model, g, _scale, self.reduction) for g in step.groups]


def _scale(layer: nn.Module) -> Tensor | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
        weight = layer.weight
        return weight.detach().float().abs() if isinstance(weight, Tensor) else None
    return None
