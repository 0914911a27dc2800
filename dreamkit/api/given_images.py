"""Images as callers hold them: tensors, data sets, loaders, folders and dreams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.sources.fitting import fitted
from dreamkit.sources.folder import Folder
from dreamkit.types import NO_LABEL, Images, ImageSource, StoredImages

_LOOKED_AT = 16
"""Images whose range tells whether they are normalised."""


class HoldsImages(Protocol):
    """What ``dreamkit.invert`` returns, and anything else that has stored images."""

    @property
    def stored(self) -> StoredImages:
        """Return them."""


ImagesLike: TypeAlias = (
    HoldsImages
    | Tensor
    | tuple[Tensor, Tensor]
    | Dataset[Any]
    | DataLoader[Any]
    | str
    | Path
    | Images
)
"""uint8 pixels, or floats normalised as the network takes them, (N, C, H, W), with or without
labels (N,); the path of an image folder; or what ``invert`` returned."""


@dataclass(frozen=True)
class GivenImages(ImageSource):
    """Images in memory where an entry of ``sources`` is expected.

    Args:
        images: as the caller holds them.
        role: what they are called in messages.
        names: of their classes, where they have some of their own.
    """

    images: Any
    role: str
    names: tuple[str, ...] | None = None

    def open(self, card: Card) -> Images:
        """Return the images at the card's input size and channels."""
        return as_images(self.images, card, self.role)

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of their classes, in order."""
        return self.names

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
        try:
            return Folder(str(given)).open(card)
        except (DreamkitError, OptionError) as error:
            raise DreamkitError(f"{role}: {error}") from error
    if isinstance(given, np.ndarray):
        given = torch.as_tensor(given)
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], np.ndarray):
        given = (torch.as_tensor(given[0]), given[1])
    stored = getattr(given, "stored", None)
    if isinstance(stored, StoredImages):
        images: Images = stored
        _to_labels(stored.labels, len(stored), card, role)
    elif isinstance(given, Tensor):
        images = _from_tensors(given, None, card, role)
    elif isinstance(given, tuple) and len(given) == 2:
        images = _from_tensors(given[0], given[1], card, role)
    elif isinstance(given, Sized) and hasattr(given, "__getitem__"):
        images = DatasetImages(given, card, role)
    elif isinstance(given, Sized) and hasattr(given, "batch"):
        images = given  # type: ignore[assignment]
    elif isinstance(given, Iterable):
        images = _from_batches(given, card, role)
    else:
        raise DreamkitError(
            f"{role}: should be dreams, a tensor, (images, labels), a Dataset, a DataLoader or the "
            f"path of an image folder, not {type(given).__name__}"
        )
    if len(images) == 0:
        raise DreamkitError(f"{role}: there are no images in it")
    size = tuple(images.batch([0])[0].shape[1:])
    if size != card.input_size:
        raise DreamkitError(
            f"{role}: the images are {size}, and {card.name} takes {card.input_size}"
        )
    return images


def _from_tensors(images: Tensor, labels: Any, card: Card, role: str) -> StoredImages:
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DreamkitError(f"{role}: images should be a tensor (N, C, H, W), not {found}")
    if images.shape[1] != card.input_size[0]:
        raise DreamkitError(
            f"{role}: the images have {images.shape[1]} channels, and {card.name} takes "
            f"{card.input_size[0]}"
        )
    stored = StoredImages(
        _to_stored(images, card, role), _to_labels(labels, len(images), card, role)
    )
    _check_range(images[:_LOOKED_AT].detach().cpu(), card, role)
    return stored


def _to_labels(labels: Any, count: int, card: Card, role: str) -> Tensor:
    if labels is None:
        return torch.full((count,), NO_LABEL)
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DreamkitError(f"{role}: labels should be whole numbers: {error}") from error
    if found.shape != (count,) or found.is_floating_point():
        raise DreamkitError(
            f"{role}: labels should be whole numbers of shape ({count},), not "
            f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
        )
    wrong = found[(found >= card.num_classes) | (found < NO_LABEL)]
    if len(wrong):
        raise DreamkitError(
            f"{role}: label {int(wrong[0])} is none of the {card.num_classes} classes "
            f"(0 to {card.num_classes - 1})"
        )
    return found.long()


def _to_stored(images: Tensor, card: Card, role: str) -> Tensor:
    """Return pixels as uint8 on the CPU; floats are normalised ones."""
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DreamkitError(f"{role}: images should be uint8 or float, not {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise DreamkitError(f"{role}: the images hold values that are not finite")
    return card.to_stored(images)


def _check_range(images: Tensor, card: Card, role: str) -> None:
    """Refuse floats that are pixels and not normalised ones; a few dozen images tell."""
    if images.dtype == torch.uint8:
        return
    low, high = (edge.expand_as(images[:1]) for edge in card.pixel_range(images))
    slack = 0.1 * (high - low)
    if bool(((images < low - slack) | (images > high + slack)).any()):
        raise DreamkitError(
            f"{role}: float images are taken as the network takes them, normalised by its mean and "
            f"std; these lie in [{float(images.min()):.3g}, {float(images.max()):.3g}], which "
            "no pixel gives: normalise them, or give uint8 pixels"
        )
    plain = any(mean != 0 for mean in card.mean)
    if plain and images.numel() and float(images.min()) >= 0 and float(images.max()) <= 1:
        raise DreamkitError(
            f"{role}: float images are taken as the network takes them, normalised by its mean and "
            "std; these lie in [0, 1]: normalise them, or give uint8 pixels"
        )


def _from_batches(batches: Iterable[Any], card: Card, role: str) -> StoredImages:
    """Return all that a loader yields, in memory."""
    parts = []
    for batch in batches:
        images, labels = _pair(batch)
        parts.append(_from_tensors(images, labels, card, role))
    if not parts:
        raise DreamkitError(f"{role}: the {type(batches).__name__} yields no batch")
    sizes = {tuple(part.images.shape[1:]) for part in parts}
    if len(sizes) > 1:
        raise DreamkitError(f"{role}: its batches are of several sizes: {sorted(sizes)}")
    return StoredImages(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )


def _pair(item: Any) -> tuple[Any, Any]:
    """Return images and labels of what a data set or loader yields."""
    if isinstance(item, Mapping):  # as Hugging Face's data sets do
        named = [item[key] for key in ("image", "img", "pixel_values") if key in item]
        return (named or [None])[0], item.get("label", item.get("labels"))
    if isinstance(item, list | tuple):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


class DatasetImages:
    """A data set's images, read when a batch is asked for.

    Args:
        dataset: of pictures (PIL) or tensors (C, H, W), each with a label or without.
        card: of the network that is to see them.
        role: what they are called in messages.
    """

    def __init__(self, dataset: Any, card: Card, role: str) -> None:
        self.dataset = dataset
        self.card = card
        self.role = role
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(card.input_size[0])
        some = [_pair(dataset[i])[0] for i in range(min(_LOOKED_AT, len(dataset)))]
        floats = [x for x in some if isinstance(x, Tensor) and x.is_floating_point()]
        if floats and len({x.shape for x in floats}) == 1:
            _check_range(torch.stack(floats), card, role)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) and labels (N,)."""
        pairs = [_pair(self.dataset[int(index)]) for index in indices]
        images = torch.stack([self._stored(image) for image, _ in pairs])
        labels = [self._label(label) for _, label in pairs]
        return images, _to_labels(labels, len(images), self.card, self.role)

    def _label(self, label: Any) -> int:
        try:
            return NO_LABEL if label is None else int(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DreamkitError(
                f"{self.role}: a label should be a whole number (got {label!r})"
            ) from error

    def _stored(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            if self.mode is None:
                raise DreamkitError(f"{self.role}: pictures have 1, 3 or 4 channels")
            return fitted(image.convert(self.mode), self.card.input_size[1:])
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise DreamkitError(
                f"{self.role}: its items should be pictures or tensors (C, H, W), not "
                f"{type(image).__name__}"
            )
        if tuple(image.shape) != self.card.input_size:
            raise DreamkitError(
                f"{self.role}: an image is {tuple(image.shape)}, and {self.card.name} takes "
                f"{self.card.input_size}"
            )
        return _to_stored(image[None], self.card, self.role)[0]
