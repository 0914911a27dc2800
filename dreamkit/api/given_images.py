"""Images as callers hold them: tensors, data sets, loaders, folders and dreams."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreamkit.api.given_datasets import DatasetImages, pair_of
from dreamkit.api.given_pixels import (
    LOOKED_AT,
    as_tensor,
    check_range,
    item_as_stored,
    to_labels,
    to_stored,
)
from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.sources.class_folders import holds_folders
from dreamkit.sources.folder import Folder
from dreamkit.types import Images, ImageSource, Labelled, StoredImages

STREAM_IMAGES = 65_536
"""Images that are read at the most of what does not tell its length: it may have no end."""
STREAM_BYTES = 2 * 2**30
"""The same in bytes of their pixels."""


class HoldsImages(Protocol):
    """What ``dreamkit.invert`` returns, and anything else that has stored images."""

    @property
    def stored(self) -> StoredImages:
        """Return them."""


ImagesLike: TypeAlias = (
    HoldsImages
    | Tensor
    | tuple[Tensor, Tensor]
    | list[Any]
    | Dataset[Any]
    | DataLoader[Any]
    | str
    | Path
    | Images
)
"""uint8 pixels, or floats normalised as the network takes them, (N, C, H, W), with or without
labels (N,); a list of pictures or of their files; the path of an image folder; or what ``invert``
returned."""


@dataclass(frozen=True)
class GivenImages(ImageSource):
    """Images in memory where an entry of ``sources`` is expected.

    Args:
        images: as the caller holds them.
        role: what they are called in messages.
        names: of their classes, where they have some of their own.
        allow_foreign: take them though they were dreamed from another network.
    """

    images: Any
    role: str
    names: tuple[str, ...] | None = None
    allow_foreign: bool = False

    def open(self, card: Card) -> Images:
        """Return the images at the card's input size and channels."""
        return as_images(self.images, card, self.role)

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of their classes, in order."""
        return self.names

    @property
    def takes_foreign(self) -> bool:
        """Whether they may be dreams of another network."""
        return self.allow_foreign

    def teacher_sha256(self) -> str | None:
        """Return the hash of the network that they were dreamed from; None if they do not tell."""
        card = getattr(self.images, "card", None)
        return card.weights_sha256 if isinstance(card, Card) else None

    def entry(self) -> dict[str, Any]:
        """Return the entry that a recipe has of them; the path is to be filled in."""
        told = str(self.images) if isinstance(self.images, str | Path) else f"path/to/{self.role}"
        return {"source": "folder", "path": told}


def as_images(given: Any, card: Card, role: str) -> Images:
    """Return a caller's images as the rooms below take them.

    Args:
        given: see ``ImagesLike``.
        card: of the network that is to see them.
        role: what they are called in messages.

    Raises:
        DreamkitError: there are none, or they are not of the card's size or value range.
    """
    if isinstance(given, str | Path):
        return _from_folder(str(given), card, role)
    if isinstance(given, np.ndarray):
        given = as_tensor(given, card)
    elif isinstance(given, list) and len(given) == 2 and getattr(given[0], "ndim", 0) == 4:
        given = tuple(given)
    stored = getattr(given, "stored", None)
    if isinstance(stored, StoredImages):
        images: Images = stored
        to_labels(stored.labels, len(stored), card, role)
    elif isinstance(given, Tensor):
        images = _from_tensors(given, None, card, role)
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], list):
        images = DatasetImages(_together(*given, role), card, role)
    elif isinstance(given, tuple) and len(given) == 2:
        images = _from_tensors(given[0], given[1], card, role)
    elif isinstance(given, Sized) and hasattr(given, "__getitem__"):
        images = DatasetImages(given, card, role)
    elif isinstance(given, Sized) and hasattr(given, "batch"):
        images = given  # type: ignore[assignment]
        if isinstance(images, Labelled):
            to_labels(images.labels, len(images), card, role)
    elif isinstance(given, Iterable):
        images = _from_batches(given, card, role)
    else:
        raise DreamkitError(
            f"{role}: should be dreams, a tensor, (images, labels), a Dataset, a DataLoader, a "
            f"list of pictures or the path of an image folder, not {type(given).__name__}"
        )
    if len(images) == 0:
        raise DreamkitError(f"{role}: there are no images in it")
    size = tuple(images.batch([0])[0].shape[1:])
    if size != card.input_size:
        raise DreamkitError(
            f"{role}: the images are {size}, and {card.name} takes {card.input_size}"
        )
    return images


def _from_folder(path: str, card: Card, role: str) -> Images:
    try:
        source = Folder(path)
        if not holds_folders(path):  # then the images have no labels
            source = Folder(path, labelled=False)
        return source.open(card)
    except (DreamkitError, OptionError) as error:
        raise DreamkitError(f"{role}: {error}") from error


def _together(images: list[Any], labels: Any, role: str) -> list[tuple[Any, Any]]:
    """Return a data set of images and their labels."""
    if len(images) != len(labels):
        raise DreamkitError(f"{role}: there are {len(images)} images and {len(labels)} labels")
    return list(zip(images, labels, strict=True))


def _from_tensors(images: Any, labels: Any, card: Card, role: str) -> StoredImages:
    if isinstance(images, np.ndarray):
        images = as_tensor(images, card)
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DreamkitError(f"{role}: images should be a tensor (N, C, H, W), not {found}")
    if images.shape[1] != card.input_size[0]:
        raise DreamkitError(
            f"{role}: the images have {images.shape[1]} channels, and {card.name} takes "
            f"{card.input_size[0]}"
        )
    stored = StoredImages(to_stored(images, card, role), to_labels(labels, len(images), card, role))
    check_range(images[:LOOKED_AT].detach().cpu(), card, role)
    return stored


def _from_batches(batches: Iterable[Any], card: Card, role: str) -> StoredImages:
    """Return all that a loader yields, in memory; of an endless one, as much as there is room."""
    parts: list[StoredImages] = []
    notes: tuple[str, ...] = ()
    ends, count, size_in_bytes = _tells_length(batches), 0, 0
    for batch in batches:
        images, labels = pair_of(batch, role)
        if isinstance(images, list | tuple):  # a loader that does not stack them
            images = torch.stack([item_as_stored(image, card, role) for image in images])
        parts.append(_from_tensors(images, labels, card, role))
        count += len(parts[-1])
        size_in_bytes += parts[-1].images.nbytes
        if not ends and (count >= STREAM_IMAGES or size_in_bytes >= STREAM_BYTES):
            notes = (
                f"{role}: the {type(batches).__name__} does not tell its length: its first {count} "
                "images are taken, and no more is read",
            )
            break
    if not parts:
        raise DreamkitError(f"{role}: the {type(batches).__name__} yields no batch")
    sizes = {tuple(part.images.shape[1:]) for part in parts}
    if len(sizes) > 1:
        raise DreamkitError(f"{role}: its batches are of several sizes: {sorted(sizes)}")
    labels = torch.cat([part.labels for part in parts])
    pixels = torch.cat([part.images for part in parts])
    return StoredImages(pixels, to_labels(labels, len(labels), card, role), notes=notes)


def _tells_length(batches: Iterable[Any]) -> bool:
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader of a data set that has none
        return False
    return True
