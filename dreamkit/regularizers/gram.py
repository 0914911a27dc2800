"""Features that have nothing in common: from patch to patch, and from image to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.regularizers.cosines import cosines
from dreamkit.types import InversionStep, Regularizer
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class Gram(Regularizer):
    """Squared distance of Gram matrices from the identity, within images and between them.

    IDeaL (2026), as it is told: Σ_l ‖Γ_l - I‖²_F / P² + ‖Γ - I‖²_F / B². Γ_l (P, P) has the cosine
    similarities between the P patches that block l puts out for an image, Γ (B, B) those between
    the B images of a batch. Here the first part is averaged over images and over blocks, not
    summed over blocks, so that a weight serves networks of any depth; and Γ is of the last block's
    outputs, averaged over patches. Both parts lie in [0, 1].

    Args:
        within: factor of the first part.
        between: factor of the second.
        patches: of each image that are compared, evenly spread over it.
    """

    within: Annotated[float, Field(ge=0)] = 1.0
    between: Annotated[float, Field(ge=0)] = 1.0
    patches: Annotated[int, Field(ge=2)] = 196

    needs = frozenset({"block_outputs"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        blocks = supplied(step.block_outputs or None, "block_outputs", self)
        total = step.images.new_zeros(())
        if self.within:
            parts = [_from_identity(cosines(block, self.patches)) for block in blocks]
            total = total + self.within * torch.stack(parts).mean()
        if self.between:
            images = blocks[-1].mean(1)
            total = total + self.between * _from_identity(cosines(images, len(images)))
        return total


def _from_identity(gram: Tensor) -> Tensor:
    """Return the mean square of what stands beside ones on the diagonal and zeros elsewhere."""
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return (gram - identity).square().mean()
