"""ColorShift: images in other colours each step, so that no class hangs on one."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_colours(
    shape: tuple[int, int, int], strength: float, generator: torch.Generator, device: torch.device
) -> Tensor | None:
    """Draw contrasts σ and brightnesses μ of each image's channels, for every step of a batch.

    Ghiasi et al., "Plug-In Inversion: Model-Agnostic Inversion for Vision with Data Augmentations",
    ICML 2022, where the strength is 1: ln σ and μ are uniform between plus and minus it.

    Args:
        shape: steps, images, and channels of an image.
        strength: >= 0; μ is in standard deviations of a channel.
        generator: a CPU generator.
        device: where images are.

    Returns:
        (steps, 2, N, C, 1, 1); None, and nothing is drawn, where the strength is 0.
    """
    if not strength:
        return None
    steps, *rest = shape
    drawn = strength * (2 * torch.rand(steps, 2, *rest, 1, 1, generator=generator) - 1)
    drawn[:, 0].exp_()
    return drawn.to(device)


def recoloured(images: Tensor, colours: Tensor) -> Tensor:
    """Return normalised images (N, C, H, W) in a step's colours (2, N, C, 1, 1): σ·x - μ."""
    return colours[0] * images - colours[1]
