"""Images from torchvision's data sets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, did_you_mean
from dreamkit.sources.fitting import fitted
from dreamkit.types import Images


@dataclass(frozen=True)
class TorchvisionDataset:
    """A torchvision data set of labelled images, downloaded on first use where it can be.

    Args:
        dataset: a class of ``torchvision.datasets``, e.g. ``CIFAR10``.
        root: where it lies or is downloaded to.
        arguments: for its constructor, e.g. ``{train: false}`` or ``{split: test}``.
    """

    dataset: str
    root: str = "data"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dataset not in datasets.__all__:
            hint = did_you_mean(self.dataset, datasets.__all__)
            raise OptionError("dataset", f"torchvision has no data set '{self.dataset}'{hint}")

    def open(self, card: Card) -> Images:
        """Return the data set's images at the teacher's size.

        Raises:
            DreamkitError: it cannot be made or downloaded, or its classes are not the teacher's.
        """
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
            reason = str(error).strip().partition("\n")[0][:200]
            raise DreamkitError(
                f"torchvision's {self.dataset} does not open ({type(error).__name__}: {reason}). "
                f"Put its files under {self.root}, or use an image folder: "
                "{source: folder, path: ...}"
            ) from error
        classes = getattr(found, "classes", None)
        if classes is not None and len(classes) != card.num_classes:
            raise DreamkitError(
                f"{self.dataset} has {len(classes)} classes, {card.name} has {card.num_classes}",
                ("dataset",),
            )
        return DatasetImages(found, card)


class DatasetImages:
    """A data set of (PIL image, label) pairs."""

    def __init__(self, dataset: Any, card: Card) -> None:
        self.dataset = dataset
        self.mode = "L" if card.input_size[0] == 1 else "RGB"
        self.size = card.input_size[1:]

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        images, labels = [], []
        for index in indices:
            image, label = self.dataset[int(index)]
            images.append(fitted(image.convert(self.mode), self.size))
            labels.append(int(label))
        return torch.stack(images), torch.tensor(labels)
