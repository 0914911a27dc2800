"""The ℓ2 norm of the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import InversionStep, Regularizer


@dataclass(frozen=True)
class L2Norm(Regularizer):
    """ℓ2 norm of the normalised images over the whole batch.

    DeepInversion (Yin et al., CVPR 2020), R_l2 of eq. 3.
    """

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        norm: Tensor = torch.linalg.vector_norm(step.images)
        return norm
