"""Dreams as calibration sets of other tools: pictures, arrays or tensors, and how to normalise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch

from dreamkit.card import Card
from dreamkit.errors import StoreError
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.store.picture_files import check_empty, write_pictures
from dreamkit.types import Images

Kind = Literal["imagefolder", "npy", "tensors"]
NORMALISATION = "normalisation.json"
_AT_ONCE = 256
"""Images that are in memory at a time."""


def write_calibration_set(images: Images, folder: Path, card: Card, kind: Kind) -> int:
    """Write images as other tools read them, and ``normalisation.json`` beside them.

    Args:
        images: labelled.
        folder: new or empty.
        card: of the network that they are for.
        kind: ``imagefolder``: PNG files, one folder a class. ``npy``: ``images.npy`` (N, C, H, W)
            float32, normalised as the network takes them, and ``labels.npy`` (N,) int64.
            ``tensors``: ``dreams.safetensors`` with ``images`` (N, C, H, W) uint8 and ``labels``.

    Returns:
        How many were written.

    Raises:
        StoreError: the folder is not empty or cannot be written to.
    """
    if kind == "imagefolder":
        write_pictures(images, folder, card.num_classes, card.class_names)
    else:
        check_empty(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (_write_arrays if kind == "npy" else _write_tensors)(images, folder, card)
        except OSError as error:
            raise StoreError(f"{folder} cannot be written: {error.strerror}") from error
    write_json(folder / NORMALISATION, describe(images, card, normalised=kind == "npy"))
    return len(images)


def describe(images: Images, card: Card, normalised: bool) -> dict[str, Any]:
    """Return what a tool must know of a calibration set.

    Args:
        images: of the set.
        card: of the network.
        normalised: whether its files hold what the network takes, or pixels.
    """
    return {
        "images": len(images),
        "layout": "NCHW",
        "size": list(card.input_size),
        "normalised": normalised,
        "formula": "(pixel / 255 - mean) / std, per channel",
        "mean": list(card.mean),
        "std": list(card.std),
        "network": card.name,
        "weights_sha256": card.weights_sha256,
    }


def _write_arrays(images: Images, folder: Path, card: Card) -> None:
    shape = (len(images), *images.batch([0])[0].shape[1:])
    file = np.lib.format.open_memmap(folder / "images.npy", "w+", np.float32, shape)
    labels = np.zeros(len(images), np.int64)
    for first in range(0, len(images), _AT_ONCE):
        part = range(first, min(first + _AT_ONCE, len(images)))
        stored, given = images.batch(part)
        file[first : part.stop] = card.normalise(stored).numpy()
        labels[first : part.stop] = given.numpy()
    file.flush()
    np.save(folder / "labels.npy", labels)


def _write_tensors(images: Images, folder: Path, card: Card) -> None:
    stored, labels = images.batch(range(len(images)))
    blob = safetensors.torch.save({"images": stored.contiguous(), "labels": labels})
    write_atomically(folder / "dreams.safetensors", blob)
