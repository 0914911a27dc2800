"""The distance of filters from their layer's geometric median."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamkit.criteria.coupled import Reduction, coupled_scores, filters
from dreamkit.types import PruningStep


@dataclass(frozen=True)
class FPGM:
    """Sum of a filter's distances to all filters of its layer: near the median others replace it.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019, eq. 7. Layers differ in size, so
    ``normalise: group`` of the application suits it.

    Args:
        reduction: how the distances of coupled layers become one.
    """

    reduction: Reduction = "sum"

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return distances >= 0, one tensor (channels,) for each group."""
        return [
            coupled_scores(step.model, group, _distances, self.reduction, "layer with filters")
            for group in step.groups
        ]


def _distances(layer: nn.Module) -> Tensor | None:
    rows = filters(layer)
    return None if rows is None else torch.cdist(rows, rows).sum(1)
