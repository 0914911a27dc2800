"""ColorShift: every step sees images in other colours, so that no class hangs on a strong one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Colours:
    """Contrasts and brightnesses of each image's channels, for every step of a batch.

    Args:
        scale: σ, (steps, N, C, 1, 1); None leaves images as they are.
        offset: μ, likewise.
    """

    scale: Tensor | None
    offset: Tensor | None

    def shown(self, images: Tensor, step: int) -> Tensor:
        """Return normalised images (N, C, H, W) as a step, counted from 0, sees them: σ·x - μ."""
        if self.scale is None or self.offset is None:
            return images
        return self.scale[step] * images - self.offset[step]


def draw_colours(
    shape: tuple[int, int, int], strength: float, generator: torch.Generator, device: torch.device
) -> Colours:
    """Draw each step's colours; nothing is drawn where the strength is 0.

    Ghiasi et al., "Plug-In Inversion: Model-Agnostic Inversion for Vision with Data Augmentations",
    ICML 2022, where the strength is 1: ln σ and μ are uniform between plus and minus it.

    Args:
        shape: steps, images, and channels of an image.
        strength: >= 0; μ is in standard deviations of a channel.
        generator: a CPU generator.
        device: where images are.
    """
    if not strength:
        return Colours(None, None)
    logarithm, offset = strength * (2 * torch.rand(2, *shape, 1, 1, generator=generator) - 1)
    return Colours(logarithm.exp().to(device), offset.to(device))
