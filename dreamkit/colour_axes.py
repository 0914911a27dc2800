"""Brightness, red against blue, green against magenta: photographs vary apart along these."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def colour_axes(images: Tensor, scales: tuple[float, float, float]) -> Tensor:
    """Return red, green and blue along three orthonormal axes, each divided by its scale.

    Written out with numbers: a matrix would be copied to the device at every step.

    Args:
        images: (N, 3, H, W).
        scales: of brightness, red against blue, and green against magenta.
    """
    red, green, blue = images.unbind(1)
    brightness, red_blue, magenta = scales
    return torch.stack(
        [
            (red + green + blue) / (math.sqrt(3) * brightness),
            (red - blue) / (math.sqrt(2) * red_blue),
            (red - 2 * green + blue) / (math.sqrt(6) * magenta),
        ],
        dim=1,
    )
