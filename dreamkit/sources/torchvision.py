"""Images from torchvision's data sets."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, did_you_mean, placed
from dreamkit.sources.classes import outputs_of, taken
from dreamkit.sources.fitting import fitted
from dreamkit.sources.pictures import as_mode, mode_of
from dreamkit.types import Images, ImageSource
from dreamkit.wording import first_line

_OF_FOLDERS = frozenset(("ImageFolder", "DatasetFolder"))


@dataclass(frozen=True)
class TorchvisionDataset(ImageSource):
    """A torchvision data set of labelled images, downloaded on first use where it can be.

    Args:
        dataset: a class of ``torchvision.datasets``, e.g. ``CIFAR10``.
        root: where it lies or is downloaded to.
        arguments: for its constructor, e.g. ``{train: false}`` or ``{split: test}``.
        classes: the names of the classes to take; null takes all.
    """

    dataset: str
    root: str = "data"
    arguments: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str | int, ...] | None = None

    def __post_init__(self) -> None:
        if self.dataset not in datasets.__all__:
            hint = did_you_mean(self.dataset, datasets.__all__)
            raise OptionError("dataset", f"torchvision has no data set '{self.dataset}'{hint}")

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of its classes in order; None where it does not name them.

        Raises:
            DreamkitError: it cannot be made or downloaded.
        """
        names = _names(self._made())
        if names is None:
            return None
        return tuple(names[number] for number in taken(names, self.classes, self.dataset))

    def open(self, card: Card) -> Images:
        """Return the data set's images at the teacher's size.

        Raises:
            DreamkitError: it cannot be made or downloaded, or its classes are not the teacher's.
        """
        found = self._made()
        names = _names(found)
        if names is None:
            if self.classes is not None:
                raise DreamkitError(f"{self.dataset} does not name its classes", ("classes",))
            return DatasetImages(found, card)
        numbers = taken(names, self.classes, self.dataset)
        with placed("dataset"):
            wanted = [names[number] for number in numbers]
            # Folders are in the alphabet's order; other data sets have one of their own.
            ordered = self.classes is not None or self.dataset not in _OF_FOLDERS
            matched = outputs_of(wanted, card, self.dataset, ordered)
        notes = () if matched.note is None else (matched.note,)
        if self.classes is None and matched.outputs == numbers:
            return DatasetImages(found, card, notes=notes)
        label = dict(zip(numbers, matched.outputs, strict=True))
        targets = self._targets(found)
        return DatasetImages(
            found,
            card,
            [(i, label[target]) for i, target in enumerate(targets) if target in label],
            notes,
        )

    def _made(self) -> Any:
        cls = getattr(datasets, self.dataset)
        arguments = dict(self.arguments)
        parameters = inspect.signature(cls.__init__).parameters
        if "download" in parameters:
            arguments.setdefault("download", True)
        try:
            if "root" in parameters:
                arguments = {"root": self.root} | arguments
            found = cls(**arguments)
        except Exception as error:  # each data set raises its own
            reason = first_line(error)
            raise DreamkitError(
                f"torchvision's {self.dataset} does not open ({type(error).__name__}: {reason}). "
                f"Put its files under {self.root}, or use an image folder: "
                "{source: folder, path: ...}"
            ) from error
        return found

    def _targets(self, found: Any) -> list[int]:
        """Return every image's class, where the data set knows them without decoding images."""
        for name in ("targets", "labels", "_labels"):
            targets = getattr(found, name, None)
            if targets is not None and len(targets) == len(found):
                return [int(target) for target in targets]
        raise DreamkitError(
            f"torchvision's {self.dataset} does not tell its images' classes, so none can be "
            "picked out; use an image folder: {source: folder, path: ...}",
            ("classes",),
        )


def _names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes; of several for a class, the first."""
    names = getattr(dataset, "classes", None)
    if names is None:
        return None
    return [str(name[0] if isinstance(name, list | tuple) and name else name) for name in names]


class DatasetImages:
    """A data set of (PIL image, label) pairs.

    Args:
        dataset: torchvision's.
        card: of the network that sees them.
        chosen: (position, label) of the images that are taken; None for all as they are.
        notes: what is to be known of them.

    Raises:
        DreamkitError: pictures do not have the card's channels.
    """

    def __init__(
        self,
        dataset: Any,
        card: Card,
        chosen: list[tuple[int, int]] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.dataset = dataset
        self.card = card
        self.chosen = chosen
        self.notes = notes
        self.mode = mode_of(card)
        self.size = card.input_size[1:]

    def __len__(self) -> int:
        return len(self.dataset if self.chosen is None else self.chosen)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        images, labels = [], []
        for index in indices:
            position, output = (index, None) if self.chosen is None else self.chosen[index]
            try:
                image, label = self.dataset[int(position)]
                images.append(fitted(as_mode(image, self.mode), self.size))
                labels.append(self._label(label) if output is None else output)
            except DreamkitError as error:
                raise DreamkitError(f"image {position} of the data set: {error}") from error
            except Exception as error:  # a data set's files may be damaged, or no pictures
                raise DreamkitError(
                    f"image {position} of the data set cannot be read: {first_line(error)}"
                ) from error
        return torch.stack(images), torch.tensor(labels)

    def _label(self, label: Any) -> int:
        try:
            number = operator.index(label)
        except TypeError:
            raise DreamkitError(
                f"its label is {type(label).__name__}, not the number of a class"
            ) from None
        if not 0 <= number < self.card.num_classes:
            raise DreamkitError(
                f"its label {number} is none of the {self.card.num_classes} classes of "
                f"{self.card.name} (0 to {self.card.num_classes - 1})"
            )
        return number
