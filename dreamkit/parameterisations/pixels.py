"""Pixels, optimised as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import Parameterisation


@dataclass(frozen=True)
class Pixels(Parameterisation):
    """The normalised pixels themselves, from N(0, 1).

    DeepInversion (Yin et al., CVPR 2020), section 3.1.
    """

    def start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Return noise (N, C, H, W)."""
        return torch.randn(shape, generator=generator)

    def encode(self, images: Tensor) -> Tensor:
        """Return the images, copied."""
        return images.clone()

    def render(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the parameters."""
        return parameters
