"""Images in memory that grow in number while a student is taught on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamkit.types import StoredImages


class Pool:
    """Stored images (uint8) with their labels, batch after batch, in RAM."""

    def __init__(self) -> None:
        self._images = torch.zeros(0, 0, 0, 0, dtype=torch.uint8)
        self._labels = torch.zeros(0, dtype=torch.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, content: StoredImages) -> None:
        """Add images of the size of those that are there."""
        count = self._count + len(content)
        if count > len(self._images):
            # Twice the room each time: adding stays linear in the images added.
            room = max(count, 2 * len(self._images))
            images = torch.empty(room, *content.images.shape[1:], dtype=torch.uint8)
            labels = torch.empty(room, dtype=torch.int64)
            if self._count:
                images[: self._count] = self._images[: self._count]
                labels[: self._count] = self._labels[: self._count]
            self._images, self._labels = images, labels
        self._images[self._count : count] = content.images
        self._labels[self._count : count] = content.labels
        self._count = count

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) and labels (N,)."""
        chosen = torch.as_tensor(indices)
        return self._images[: self._count][chosen], self._labels[: self._count][chosen]
