"""Sets of stored images, and where they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dreamkit.card import Card

NO_LABEL = -1
"""Stands for the class of an image whose class is not known."""


class Images(Protocol):
    """A set of stored images, all of one size, with labels (or ``NO_LABEL``)."""

    def __len__(self) -> int:
        """Return how many there are."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) and labels (N,) int64."""


@runtime_checkable
class Labelled(Protocol):
    """What a set of images has that tells its labels (N,) without reading the images."""

    @property
    def labels(self) -> Tensor:
        """The label of every image (N,) int64, or ``NO_LABEL``."""


@runtime_checkable
class WithNotes(Protocol):
    """What a set of images has of which its user must know something."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Each for the report, such as how classes were matched."""


def notes_of(images: Images) -> tuple[str, ...]:
    """Return what the user of a set of images must know of it."""
    return images.notes if isinstance(images, WithNotes) else ()


@dataclass(frozen=True)
class StoredImages:
    """Images held in memory: stored images (N, C, H, W) uint8, labels and teacher logits."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]

    def chosen(self, which: Tensor) -> StoredImages:
        """Return those of a mask (N,) bool, or at positions (M,)."""
        logits = None if self.teacher_logits is None else self.teacher_logits[which]
        return StoredImages(self.images[which], self.labels[which], logits, self.notes)


class ImageSource(ABC):
    """An entry of ``sources``. Its constructor checks paths; ``open`` reads."""

    @abstractmethod
    def open(self, card: Card) -> Images:
        """Return the images at the card's input size and channels.

        What the user must know of them may stand in their ``notes``, a tuple of texts.

        Raises:
            DreamkitError: they cannot be read, or are not what the card asks for.
        """

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of its classes in order; None where its images have none of their own.

        Raises:
            DreamkitError: its classes cannot be told.
        """
        return None

    def teacher_sha256(self) -> str | None:
        """Return the hash of the weights that its images were dreamed from, where it is known.

        A network never judges what was dreamed from itself.
        """
        return None

    @property
    def takes_foreign(self) -> bool:
        """Whether its images may be dreams of other weights than those of the run's teacher."""
        return False
