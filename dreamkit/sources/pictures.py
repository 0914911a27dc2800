"""Picture files and pictures in memory: read as they are meant, or refused by name.

Pictures are read as torchvision's ``ImageFolder`` and timm read them, so that accuracies compare:
the first frame or page, as it is stored (a camera's note that it stands upright is not followed),
transparency dropped and the colour beneath it kept. Other than there, 16 bits are scaled to 8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.sources.fitting import fitted
from dreamkit.wording import one_line

THREADS = 4
CHECKED = 20_000
"""Files whose beginning and end are looked at when a folder is opened: about two seconds."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TAIL = 4096
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""What the last bytes of a whole file hold."""
_NAMED = 3
_SIXTEEN = 257  # 65535 / 255


def mode_of(card: Card) -> str:
    """Return Pillow's mode of what a network takes.

    Raises:
        DreamkitError: pictures do not have its channels.
    """
    channels = card.input_size[0]
    if channels not in _MODES:
        raise DreamkitError(f"pictures have 1, 3 or 4 channels; {card.name} takes {channels}")
    return _MODES[channels]


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture with the channels that a network takes, 8 bits each.

    Args:
        image: of any of Pillow's modes.
        mode: ``L``, ``RGB`` or ``RGBA``.

    Raises:
        DreamkitError: its values have no defined white.
    """
    check_mode(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + _SIXTEEN // 2) // _SIXTEEN).astype(np.uint8))
    elif image.mode in {"La", "RGBa"}:  # Pillow converts these to nothing else
        image = image.convert(f"{image.mode[:-1]}A")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # to RGB Pillow warns
    return image.convert(mode)


def read_picture(file: str, card: Card, resize: float = 1.0) -> Tensor:
    """Return a picture file as a stored image (C, H, W) of a network's size.

    Args:
        file: its path.
        card: of the network that is to see it.
        resize: see ``fitted``.

    Raises:
        DreamkitError: it cannot be decoded, naming it.
    """
    mode = mode_of(card)
    try:
        with Image.open(file) as image:
            return fitted(as_mode(image, mode), card.input_size[1:], resize)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise DreamkitError(f"{file} cannot be decoded: {error}") from error


def check_mode(image: Image.Image) -> None:
    """Refuse a picture of 32-bit or float values.

    Raises:
        DreamkitError: saying which.
    """
    sixteen = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in {"PPM", "PNG"}
    )
    if image.mode == "F" or (image.mode.startswith("I") and not sixteen):
        kind = "floats" if image.mode == "F" else "32-bit whole numbers"
        raise DreamkitError(f"it holds {kind}, which have no white; save it in 8 or 16 bits")


def check_files(files: Sequence[str]) -> None:
    """Refuse files that are no pictures, before work is done that needs them.

    Of each, up to ``CHECKED`` spread over all, the beginning is read, and decoded is what ends
    as if it were cut off.

    Raises:
        DreamkitError: naming some of those that cannot be read, each with the reason.
    """
    looked_at = files[:: max(1, math.ceil(len(files) / CHECKED))]
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(_fault, looked_at))
    wrong = [f"{file} {why}" for file, why in zip(looked_at, reasons, strict=True) if why]
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        them = "it" if len(wrong) == 1 else "them"
        raise DreamkitError(
            f"{'; '.join(wrong[:_NAMED])}{more}: mend {them}, or take {them} out of the folder"
        )


def _fault(file: str) -> str | None:
    """Return why a file cannot be read as a picture; None if it seems that it can."""
    try:
        size = os.stat(file).st_size
        if size == 0:
            return "is an empty file"
        with open(file, "rb") as stream, Image.open(stream) as image:
            check_mode(image)
            end = _ENDS.get(image.format or "")
            if end is not None:
                position = stream.tell()
                stream.seek(max(0, size - _TAIL))
                whole = end in stream.read()
                stream.seek(position)
                if not whole:
                    image.load()
    except DreamkitError as error:
        return f"cannot be read: {error.message}"
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        return f"cannot be decoded: {one_line(error)}"
    return None
