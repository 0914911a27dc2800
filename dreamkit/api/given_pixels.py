"""Pixels and labels as callers hold them, turned into stored images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.sources.fitting import fitted
from dreamkit.sources.pictures import as_mode, mode_of, read_picture
from dreamkit.types import NO_LABEL

LOOKED_AT = 16
"""Images whose range tells whether they are normalised."""


def to_stored(images: Tensor, card: Card, role: str) -> Tensor:
    """Return pixels as uint8 on the CPU; floats are normalised ones.

    Args:
        images: (N, C, H, W).
        card: of the network that is to see them.
        role: what they are called in messages.

    Raises:
        DreamkitError: they are of another kind, or not finite.
    """
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DreamkitError(f"{role}: images should be uint8 or float, not {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise DreamkitError(f"{role}: the images hold values that are not finite")
    return card.to_stored(images)


def check_range(images: Tensor, card: Card, role: str) -> None:
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


def as_tensor(images: np.ndarray[Any, Any], card: Card) -> Tensor:
    """Return an array as a tensor, with channels first where they are last.

    Args:
        images: (N, C, H, W), (N, H, W, C), or (N, H, W) for a network of one channel.
        card: of the network that is to see them.
    """
    channels, *size = card.input_size
    if images.ndim == 3 and channels == 1 and list(images.shape[1:]) == size:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1:] == (*size, channels) != card.input_size:
        images = images.transpose(0, 3, 1, 2)
    return torch.as_tensor(np.ascontiguousarray(images))


def item_as_stored(image: Any, card: Card, role: str) -> Tensor:
    """Return one image of a data set as a stored one (C, H, W).

    Args:
        image: a picture (PIL), the path of one, or an array of pixels (H, W) or (H, W, C), uint8
            or 16-bit grey: these are scaled and cropped; or a tensor or an array (C, H, W) as the
            network takes it.
        card: of the network that is to see it.
        role: what images are called in messages.

    Raises:
        DreamkitError: it is something else, or of another size.
    """
    if is_path(image):
        return read_picture(str(image), card)
    if isinstance(image, np.ndarray):
        image = _array(image, card)
    if isinstance(image, Image.Image):
        return fitted(as_mode(image, mode_of(card)), card.input_size[1:])
    if not isinstance(image, Tensor) or image.dim() != 3:
        found = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else None
        raise DreamkitError(
            f"{role}: its items should be pictures or tensors (C, H, W), not "
            f"{found or type(image).__name__}"
        )
    if tuple(image.shape) != card.input_size:
        raise DreamkitError(
            f"{role}: an image is {tuple(image.shape)}, and {card.name} takes {card.input_size}"
        )
    return to_stored(image[None], card, role)[0]


def is_path(image: Any) -> bool:
    """Whether an image is given as the path of its file."""
    return isinstance(image, str | Path)


def _array(image: np.ndarray[Any, Any], card: Card) -> Any:
    picture = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in {1, 3, 4})
    if image.shape != card.input_size and picture and image.dtype in (np.uint8, np.uint16):
        return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    return torch.as_tensor(np.ascontiguousarray(image))


def to_labels(
    labels: Any, count: int, card: Card, role: str, places: Sequence[int] | None = None
) -> Tensor:
    """Return labels (N,) int64.

    Args:
        labels: whole numbers (N,) or (N, 1), one-hot rows (N, classes), or None for none.
        count: of the images.
        card: of the network.
        role: what images are called in messages.
        places: of the images in their set, for messages; in order by default.

    Raises:
        DreamkitError: they are something else, out of range, or some images have one and others
            have none; the message names the image.
    """
    if labels is None:
        return torch.full((count,), NO_LABEL)
    found = _whole(labels, card, role, one_hot=2)
    if found.shape != (count,):
        raise DreamkitError(
            f"{role}: labels should be whole numbers of shape ({count},), not of shape "
            f"{tuple(found.shape)}"
        )
    places = range(count) if places is None else places
    wrong = ((found >= card.num_classes) | (found < NO_LABEL)).nonzero().flatten().tolist()
    if wrong:
        raise DreamkitError(
            f"{role}: label {int(found[wrong[0]])} is none of the {card.num_classes} classes "
            f"(0 to {card.num_classes - 1}), at image {places[wrong[0]]}"
        )
    bare = (found == NO_LABEL).nonzero().flatten().tolist()
    if 0 < len(bare) < count:
        raise DreamkitError(
            f"{role}: image {places[bare[0]]} has no label, and others have one: give all of them "
            "labels, or none"
        )
    return found


def label_of(label: Any, card: Card, role: str) -> int:
    """Return the label of one image, ``NO_LABEL`` for None.

    Raises:
        DreamkitError: it is neither a whole number nor one-hot.
    """
    if label is None:
        return NO_LABEL
    found = _whole(label, card, role, one_hot=1)
    if found.numel() != 1:
        raise DreamkitError(f"{role}: a label should be a whole number (got {label!r})")
    return int(found)


def _whole(labels: Any, card: Card, role: str, one_hot: int) -> Tensor:
    """Return whole numbers as int64; of one-hot rows the numbers of the classes.

    Args:
        labels: anything.
        card: of the network.
        role: what images are called in messages.
        one_hot: dimensions that one-hot labels have.
    """
    try:
        found = labels if isinstance(labels, Tensor) else torch.as_tensor(_plain(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DreamkitError(
            f"{role}: a label should be a whole number (got {_shown(labels)}): {error}"
        ) from error
    found = found.detach().cpu()
    if found.dim() == one_hot and found.shape[-1] == card.num_classes:
        rows = found.reshape(-1, card.num_classes)
        if bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()):
            return rows.argmax(1).reshape(found.shape[:-1])
    if found.is_complex() or (found.is_floating_point() and bool((found != found.round()).any())):
        raise DreamkitError(
            f"{role}: labels should be whole numbers, not shares of several classes (got "
            f"{_shown(labels)})"
        )
    found = found.long()
    return found[:, 0] if found.dim() == 2 and found.shape[1] == 1 else found


def _plain(labels: Any) -> Any:
    """Return numbers as numpy has them, unsigned ones as torch takes them."""
    array = np.asarray(labels)
    return array.astype(np.int64) if array.dtype.kind in "ub" else array


def _shown(labels: Any) -> str:
    return f"{labels!r}"[:80]
