"""The generator of DAFL, CMI and FastDFKD: noise to images by upsampling and convolutions."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class Generator(nn.Module):
    """Noise to images with pixels in (0, 1): a linear layer, then two doublings of the size.

    The decoder of DCGAN (Radford et al. 2016) with nearest upsampling for transposed convolutions,
    as in DAFL (Chen et al., ICCV 2019), section 4.

    Args:
        latent: size of the noise.
        width: channels at the full size; the others have twice as many.
        shape: (C, H, W) of the images.
    """

    def __init__(self, latent: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *size = shape
        self.sizes = [tuple(math.ceil(side / part) for side in size) for part in (4, 2, 1)]
        self.width = width
        self.project = nn.Linear(latent, 2 * width * math.prod(self.sizes[0]))
        self.bn0 = nn.BatchNorm2d(2 * width)
        self.conv1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise (N, latent) to pixels (N, C, H, W) in (0, 1)."""
        x = self.project(noise).view(-1, 2 * self.width, *self.sizes[0])
        x = F.interpolate(self.bn0(x), size=self.sizes[1], mode="nearest")
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        x = F.interpolate(x, size=self.sizes[2], mode="nearest")
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        return self.conv3(x).sigmoid()
