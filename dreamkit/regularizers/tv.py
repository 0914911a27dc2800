"""Total variation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dreamkit.types import InversionStep, Regularizer


@dataclass(frozen=True)
class TotalVariation(Regularizer):
    """Total variation: differences of neighbouring pixels, horizontal, vertical, both diagonals.

    DeepInversion (Yin et al., CVPR 2020), R_TV of eq. 3.

    Args:
        norm: ``l2`` sums the ℓ2 norms of the four difference images, each over the whole batch
            (the paper); ``l1`` sums their mean absolute values.
    """

    norm: Literal["l2", "l1"] = "l2"

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        x = step.images
        differences = (
            x[..., :, 1:] - x[..., :, :-1],
            x[..., 1:, :] - x[..., :-1, :],
            x[..., 1:, 1:] - x[..., :-1, :-1],
            x[..., 1:, :-1] - x[..., :-1, 1:],
        )
        if self.norm == "l2":
            return sum((d.norm() for d in differences), start=x.new_zeros(()))
        return sum((d.abs().mean() for d in differences), start=x.new_zeros(()))
