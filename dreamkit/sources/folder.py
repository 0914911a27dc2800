"""Images from a folder of class folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, MissingPath, OptionError
from dreamkit.sources.class_folders import class_folders, misplaced, pictures
from dreamkit.sources.classes import outputs_of, quoted, taken
from dreamkit.sources.pictures import THREADS, check_files, mode_of, read_picture
from dreamkit.types import NO_LABEL, Images, ImageSource
from dreamkit.wording import and_more


@dataclass(frozen=True)
class Folder(ImageSource):
    """Images in ``path/<class>/*``: real ones to evaluate on, or any to stand in for dreams.

    Folders named like the teacher's classes are these, however the names are written (``red_fox``
    is ``Red Fox``); some may be absent. Folders named by numbers are the outputs of these numbers.
    Any others are the outputs in alphabetical order, one for each, and a note says so. Hidden and
    empty folders are no classes. Images are scaled to cover the teacher's input and cropped in the
    centre. Like torchvision, it takes the first frame, drops transparency and does not turn
    photographs upright; 16-bit greys are scaled to 8 bits, and 32-bit ones and floats are refused.

    Args:
        path: the folder.
        resize: length of the shorter side before cropping, as a multiple of the crop
            (256/224 is usual for ImageNet evaluation).
        labelled: false where class folders mean nothing to the teacher (proxy images), or where
            there are none.
        classes: the class folders to take, e.g. ``[cat, dog]``, in the order of the outputs where
            their names do not tell; null takes all.
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
        return tuple(self._chosen()) if self.labelled else None

    def open(self, card: Card) -> Images:
        """Return the folder's images, decoded when a batch is asked for.

        Raises:
            DreamkitError: no images, files that are none, or classes that are not the teacher's.
        """
        if not self.labelled and self.classes is None:
            found = {"": pictures(self.path)}  # at any depth
        else:
            found = {name: pictures(os.path.join(self.path, name)) for name in self._chosen()}
        others = sum((part.others for part in found.values()), Counter[str]())
        full = {name: part.files for name, part in found.items() if part.files}
        if not full:
            there = f" but {_counted(others)}" if others else ""
            raise DreamkitError(f"{self.path}: there is no image in it{there}", ("path",))
        outputs, notes = [NO_LABEL] * len(full), list[str]()
        if self.labelled:
            empty = [name for name in found if name not in full]
            outputs, notes = self._outputs(list(full), empty, list(found), card)
            loose = len(pictures(self.path, deep=False).files)
            if loose:
                notes.append(f"{self.path}: {loose} images beside the class folders are left out")
        if others:
            notes.append(f"{self.path}: what is no picture is left out: {_counted(others)}")
        files = [file for part in full.values() for file in part]
        check_files(files)
        counts = torch.tensor([len(part) for part in full.values()])
        labels = torch.tensor(outputs).repeat_interleave(counts)
        return FolderImages(files, labels, card, self.resize, tuple(notes))

    def _chosen(self) -> list[str]:
        """Return the class folders that are taken, in order."""
        names = class_folders(self.path)
        return [names[number] for number in taken(names, self.classes, self.path)]

    def _outputs(
        self, full: list[str], empty: list[str], places: list[str], card: Card
    ) -> tuple[list[int], list[str]]:
        """Return the output that each folder with images is, and what is to be told of it."""
        try:
            matched = outputs_of(full, card, self.path, self.classes is not None, places)
        except DreamkitError as error:
            raise DreamkitError(
                f"{error.message}{misplaced(self.path, full)}; with 'labelled: false' the classes "
                "are ignored (for training only)",
                ("path",),
            ) from error
        notes = [matched.note] if matched.note else []
        if empty:
            notes.append(f"{self.path}: there is no image in {quoted(empty)}")
        return matched.outputs, notes


def _counted(others: Counter[str]) -> str:
    return and_more([f"{count} {suffix}" for suffix, count in others.most_common()])


class FolderImages:
    """Image files with labels, decoded by a few threads when asked for."""

    def __init__(
        self,
        files: list[str],
        labels: Tensor,
        card: Card,
        resize: float,
        notes: tuple[str, ...] = (),
    ) -> None:
        mode_of(card)  # refuses a network that takes no pictures
        self.files = files
        self.labels = labels
        self.notes = notes
        self.card = card
        self.resize = resize

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        chosen = [int(i) for i in indices]
        with ThreadPoolExecutor(THREADS) as pool:
            images = list(
                pool.map(lambda i: read_picture(self.files[i], self.card, self.resize), chosen)
            )
        return torch.stack(images), self.labels[chosen]
