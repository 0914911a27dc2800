"""Images from a folder of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, MissingPath, OptionError
from dreamkit.sources.fitting import fitted
from dreamkit.types import NO_LABEL, Images

_THREADS = 4


@dataclass(frozen=True)
class Folder:
    """Images in ``path/<class>/*``: real ones to evaluate on, or any to stand in for dreams.

    Class folders in alphabetical order are the teacher's outputs in order, one for each, unless
    they are named like the teacher's classes; then some may be absent. Images are
    scaled to cover the teacher's input and cropped in the centre.

    Args:
        path: the folder.
        resize: length of the shorter side before cropping, as a multiple of the crop
            (256/224 is usual for ImageNet evaluation).
        labelled: false where class folders mean nothing to the teacher (proxy images).
    """

    path: str
    resize: float = 1.0
    labelled: bool = True

    def __post_init__(self) -> None:
        if not Path(self.path).is_dir():
            raise MissingPath("path", f"no such folder: {self.path}")
        if self.resize < 1:
            raise OptionError("resize", f"should be at least 1 (got {self.resize})")

    def open(self, card: Card) -> Images:
        """Return the folder's images, decoded when a batch is asked for.

        Raises:
            DreamkitError: no images, or classes that are not the teacher's.
        """
        try:
            found = ImageFolder(self.path)
        except FileNotFoundError as error:
            raise DreamkitError(f"{self.path}: {error}") from error
        if not self.labelled:
            labels = [NO_LABEL] * len(found)
        elif card.class_names and set(found.classes) <= set(card.class_names):
            outputs = [card.class_names.index(name) for name in found.classes]
            labels = [outputs[target] for target in found.targets]
        elif len(found.classes) != card.num_classes:
            raise DreamkitError(
                f"{self.path} has {len(found.classes)} class folders, {card.name} has "
                f"{card.num_classes} outputs, and their names do not tell which is which; with "
                "'labelled: false' the classes are ignored (for training only)",
                ("path",),
            )
        else:
            labels = list(found.targets)
        return FolderImages([path for path, _ in found.samples], labels, card, self.resize)


class FolderImages:
    """Image files with labels, decoded by a few threads when asked for."""

    def __init__(self, files: list[str], labels: list[int], card: Card, resize: float) -> None:
        channels, height, width = card.input_size
        self.files = files
        self.labels = torch.tensor(labels)
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
        if self.mode is None:
            raise DreamkitError(
                f"image files have 1, 3 or 4 channels; {card.name} takes {channels}"
            )
        self.size = (height, width)
        self.resize = resize

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        chosen = [int(i) for i in indices]
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(lambda i: self._decode(self.files[i]), chosen))
        return torch.stack(images), self.labels[chosen]

    def _decode(self, file: str) -> Tensor:
        try:
            with Image.open(file) as image:
                pixels = image.convert(self.mode)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DreamkitError(f"{file} cannot be decoded: {error}") from error
        return fitted(pixels, self.size, self.resize)
