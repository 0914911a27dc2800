"""Images of stripes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from dreamkit.plugin import NO_LABEL, Card, Field, Images, ImageSource, StoredImages


@dataclass(frozen=True)
class Stripes(ImageSource):
    """Grey sine waves of random direction, period and phase: about the simplest proxy images.

    Args:
        images: how many.
        seed: of what is random.
    """

    images: Annotated[int, Field(ge=1)] = 256
    seed: Annotated[int, Field(ge=0)] = 0

    def open(self, card: Card) -> Images:
        """Return the images, without labels."""
        draws = torch.Generator().manual_seed(self.seed)
        angle, period, phase = torch.rand(3, self.images, 1, 1, generator=draws)
        channels, height, width = card.input_size
        rows = torch.arange(height).view(1, -1, 1) / height
        columns = torch.arange(width).view(1, 1, -1) / width
        along = rows * (math.pi * angle).sin() + columns * (math.pi * angle).cos()
        waves = (2 * math.pi * (along * (1 + 3 * period) + phase)).sin()
        pixels = (127.5 * (1 + waves)).round().to(torch.uint8)
        stored = pixels[:, None].repeat(1, channels, 1, 1)
        return StoredImages(stored, torch.full((self.images,), NO_LABEL))
