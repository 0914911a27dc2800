"""The generator of DAFL and its successors: noise to images by upsampling and convolutions."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

BASE = 8
"""Largest side that the noise is projected to."""


class Generator(nn.Module):
    """Noise to images with pixels in (0, 1): a linear layer, then doublings of the size.

    The decoder of DCGAN (Radford et al. 2016) with nearest upsampling for transposed convolutions,
    as in DAFL (Chen et al., ICCV 2019), section 4: two doublings, more above 32 pixels.

    Args:
        latent: size of the noise.
        width: channels at the full size; the others have twice as many.
        shape: (C, H, W) of the images.
    """

    def __init__(self, latent: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, cells = shape
        doublings = max(2, math.ceil(math.log2(max(height, cells) / BASE)))
        parts = [2**power for power in range(doublings, -1, -1)]
        self.sizes = [(math.ceil(height / part), math.ceil(cells / part)) for part in parts]
        self.width = width
        self.project = nn.Linear(latent, 2 * width * math.prod(self.sizes[0]))
        self.bn = nn.BatchNorm2d(2 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, wide, 3, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(0.2),
            )
            for wide in [2 * width] * (doublings - 1) + [width]
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise (N, latent) to pixels (N, C, H, W) in (0, 1)."""
        x = self.bn(self.project(noise).view(-1, 2 * self.width, *self.sizes[0]))
        for size, block in zip(self.sizes[1:], self.blocks, strict=True):
            x = block(F.interpolate(x, size=size, mode="nearest"))
        return self.last(x).sigmoid()  # type: ignore[no-any-return]
