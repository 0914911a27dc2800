"""Images of one size for networks that take another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.types import Images, Labelled, notes_of


def resized(
    images: Tensor, size: Sequence[int], mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Scale images (N, C, H, W) whole, without cropping, antialiased.

    Args:
        images: stored, or of floats.
        size: (height, width).
        mode: of the interpolation; ``bicubic`` is sharper, and overshoots at edges.

    Returns:
        float32, not rounded; images that have the size as they are.
    """
    if list(images.shape[2:]) == list(size):
        return images
    return F.interpolate(images.float(), size=list(size), mode=mode, antialias=True)


@dataclass(frozen=True)
class Resized:
    """A set of images, each scaled whole when it is asked for, bicubic: blur costs accuracy.

    Args:
        images: stored.
        size: (height, width).
    """

    images: Images
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        stored, labels = self.images.batch(indices)
        pixels = resized(stored, self.size, "bicubic")
        return pixels.round().clamp(0, 255).to(torch.uint8), labels

    @property
    def labels(self) -> Tensor:
        """The label of every image (N,)."""
        if isinstance(self.images, Labelled):
            return self.images.labels
        return self.images.batch(range(len(self.images)))[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of them."""
        return notes_of(self.images)


class TakesResized(nn.Module):
    """A network that is shown images of another size than its own: they are scaled to that first.

    Args:
        network: (N, C, H, W) to logits.
        size: (height, width) of its images.
    """

    def __init__(self, network: nn.Module, size: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.size = tuple(size)

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's logits of normalised images (N, C, H, W) of any size."""
        logits: Tensor = self.network(resized(images, self.size, "bicubic"))
        return logits


def for_card(images: Images, now: Card, card: Card) -> Images:
    """Return images as a network takes them.

    Args:
        images: of the size of ``now``.
        now: the card of the network that they were made for.
        card: the network's.
    """
    if now.input_size == card.input_size:
        return images
    return Resized(images, card.input_size[1:])
