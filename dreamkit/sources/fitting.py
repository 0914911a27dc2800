"""Bringing a picture to the size a teacher takes."""

from __future__ import annotations

import math

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from dreamkit.errors import DreamkitError

_MOST_PIXELS = 89_478_485
"""Pillow's limit, above which it warns of a decompression bomb."""


def fitted(image: Image.Image, size: tuple[int, int], resize: float = 1.0) -> Tensor:
    """Scale a picture until it covers (height, width), and crop the centre.

    Args:
        image: any size; it is left alone if it fits already and ``resize`` is 1.
        size: (height, width).
        resize: covers this many times the size before cropping, >= 1.

    Returns:
        uint8 (C, height, width).

    Raises:
        DreamkitError: a picture so long and narrow that covering the size takes more pixels than
            Pillow decodes without a warning.
    """
    height, width = size
    if (image.height, image.width) != size or resize != 1:
        scale = max(height / image.height, width / image.width) * resize
        cover = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
        if math.prod(cover) > _MOST_PIXELS:
            raise DreamkitError(f"{image.width}x{image.height} pixels are too long and narrow")
        scaled = functional.resize(image, cover, antialias=True)
        image = functional.center_crop(scaled, [height, width])
    tensor: Tensor = functional.pil_to_tensor(image)
    return tensor
