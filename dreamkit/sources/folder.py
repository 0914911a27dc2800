"""Images from a folder of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, MissingPath, OptionError
from dreamkit.sources.classes import outputs_of, taken
from dreamkit.sources.fitting import fitted
from dreamkit.types import NO_LABEL, Images, ImageSource

_THREADS = 4


@dataclass(frozen=True)
class Folder(ImageSource):
    """Images in ``path/<class>/*``: real ones to evaluate on, or any to stand in for dreams.

    Class folders in alphabetical order are the teacher's outputs in order, one for each, unless
    they are named like the teacher's classes; then some may be absent. Images are
    scaled to cover the teacher's input and cropped in the centre.

    Args:
        path: the folder.
        resize: length of the shorter side before cropping, as a multiple of the crop
            (256/224 is usual for ImageNet evaluation).
        labelled: false where class folders mean nothing to the teacher (proxy images).
        classes: the class folders to take, e.g. ``[cat, dog]``; null takes all.
    """

    path: str
    resize: float = 1.0
    labelled: bool = True
    classes: tuple[str | int, ...] | None = None

    def __post_init__(self) -> None:
        if not Path(self.path).is_dir():
            raise MissingPath("path", f"no such folder: {self.path}")
        if self.resize < 1:
            raise OptionError("resize", f"should be at least 1 (got {self.resize})")

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of its classes in order; None where folders are not classes.

        Raises:
            DreamkitError: there are none.
        """
        if not self.labelled:
            return None
        try:
            names, _ = find_classes(self.path)
        except FileNotFoundError as error:
            raise DreamkitError(f"{self.path}: {error}") from error
        return tuple(names[number] for number in taken(names, self.classes, self.path))

    def open(self, card: Card) -> Images:
        """Return the folder's images, decoded when a batch is asked for.

        Raises:
            DreamkitError: no images, or classes that are not the teacher's.
        """
        try:
            found = ImageFolder(self.path)
        except FileNotFoundError as error:
            raise DreamkitError(f"{self.path}: {error}") from error
        numbers = taken(found.classes, self.classes, self.path)
        if self.labelled:
            outputs = self._outputs([found.classes[number] for number in numbers], card)
        else:
            outputs = [NO_LABEL] * len(numbers)
        label = dict(zip(numbers, outputs, strict=True))
        samples = [(file, label[number]) for file, number in found.samples if number in label]
        files = [file for file, _ in samples]
        return FolderImages(files, [target for _, target in samples], card, self.resize)

    def _outputs(self, names: list[str], card: Card) -> list[int]:
        try:
            return outputs_of(names, card, self.path)
        except DreamkitError as error:
            raise DreamkitError(
                f"{error.message}; with 'labelled: false' the classes are ignored (for training "
                "only)",
                ("path",),
            ) from error


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
            return fitted(pixels, self.size, self.resize)
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            raise DreamkitError(f"{file} cannot be decoded: {error}") from error
