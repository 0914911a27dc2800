"""Walking through images in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import Images


@dataclass(frozen=True)
class Subset:
    """Some of a set of images, in an order of their own."""

    images: Images
    chosen: list[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        return self.images.batch([self.chosen[index] for index in indices])


def drawn(images: Images, count: int, generator: torch.Generator) -> Subset:
    """Return at most ``count`` images, drawn at random without repetition."""
    order = torch.randperm(len(images), generator=generator)
    return Subset(images, order[:count].tolist())


def in_order(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once: stored images (N, C, H, W) and labels (N,)."""
    for first in range(0, len(images), batch_size):
        yield images.batch(range(first, min(first + batch_size, len(images))))


def epochs_of(
    images: Images, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches for some epochs; a last batch of one image is left out.

    BatchNorm in training has no variance to learn from a single image of 1×1 features.
    """
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for indices in order.split(batch_size):
            if len(indices) > 1 or len(images) == 1:
                yield images.batch(indices.tolist())
