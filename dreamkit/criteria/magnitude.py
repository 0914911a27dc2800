"""The norm of filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dreamkit.criteria.coupled import Reduction, check_makers, coupled_scores, filters
from dreamkit.types import ChannelGroup, Criterion, PruningStep


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Norm of a channel's filters: what is small is taken to matter little.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. Filters of different layers
    differ in size, so ``normalise: group`` of the application suits it.

    Args:
        norm: 1 or 2, the p of the norm.
        reduction: how the norms of coupled layers become one.
    """

    norm: Literal[1, 2] = 1
    reduction: Reduction = "sum"

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse groups that neither a convolution nor a linear layer makes.

        Raises:
            NothingToPrune: there are some.
        """
        check_makers(model, groups, filters, "layer with filters")

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return norms >= 0, one tensor (channels,) for each group."""
        return [coupled_scores(step.model, g, self._norms, self.reduction) for g in step.groups]

    def _norms(self, layer: nn.Module) -> Tensor | None:
        rows = filters(layer)
        return None if rows is None else rows.norm(self.norm, dim=1)
