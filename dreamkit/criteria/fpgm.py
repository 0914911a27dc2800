"""The distance of filters from their layer's geometric median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamkit.criteria.coupled import Reduction, check_makers, coupled_scores, filters
from dreamkit.types import ChannelGroup, Criterion, PruningStep


@dataclass(frozen=True)
class FPGM(Criterion):
    """Sum of a filter's distances to all filters of its layer: near the median others replace it.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019, eq. 7. Layers differ in size, so
    ``normalise: group`` of the application suits it.

    Args:
        reduction: how the distances of coupled layers become one.
    """

    reduction: Reduction = "sum"

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse groups that neither a convolution nor a linear layer makes.

        Raises:
            NothingToPrune: there are some.
        """
        check_makers(model, groups, filters, "layer with filters")

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return distances >= 0, one tensor (channels,) for each group."""
        return [coupled_scores(step.model, g, _distances, self.reduction) for g in step.groups]


def _distances(layer: nn.Module) -> Tensor | None:
    rows = filters(layer)
    return None if rows is None else torch.cdist(rows, rows).sum(1)
