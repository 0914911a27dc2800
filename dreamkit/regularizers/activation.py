"""Strength of the teacher's features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamkit.types import InversionStep, Regularizer
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class Activation(Regularizer):
    """Minus the mean absolute feature before the last layer: real images excite more filters.

    Data-Free Learning of student networks (DAFL, Chen et al., ICCV 2019), L_a.
    """

    needs = frozenset({"features"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        return -supplied(step.features, "features", self).abs().mean()
