"""Data sets as callers hold them: of pictures, arrays, tensors or files, with labels or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamkit.api.given_pixels import (
    LOOKED_AT,
    check_range,
    is_path,
    item_as_stored,
    label_of,
    to_labels,
)
from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.sources.classes import same_name
from dreamkit.sources.pictures import check_files
from dreamkit.types import NO_LABEL
from dreamkit.wording import first_line

_IMAGES = ("image", "images", "img", "pixel_values")
_LABELS = ("label", "labels", "target", "fine_label")


def pair_of(item: Any, role: str) -> tuple[Any, Any]:
    """Return images and labels of what a data set or loader yields.

    Raises:
        DreamkitError: it is a mapping that names no images, or empty.
    """
    if isinstance(item, Mapping):  # as Hugging Face's data sets do
        image = next((item[key] for key in _IMAGES if key in item), None)
        if image is None:
            raise DreamkitError(
                f"{role}: its items have {', '.join(map(str, item))}, and no image under "
                f"{', '.join(_IMAGES)}"
            )
        return image, next((item[key] for key in _LABELS if key in item), None)
    if isinstance(item, list | tuple):
        if not item:
            raise DreamkitError(f"{role}: one of its items is empty")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


class DatasetImages:
    """A data set's images, read when a batch is asked for.

    Args:
        dataset: of pictures (PIL), picture files, arrays or tensors, each with a label or without.
        card: of the network that is to see them.
        role: what they are called in messages.
    """

    def __init__(self, dataset: Any, card: Card, role: str) -> None:
        self.dataset = dataset
        self.card = card
        self.role = role
        self.notes = _notes(dataset, card, role)
        some = [self._pair(index) for index in range(min(LOOKED_AT, len(dataset)))]
        self.labelled = bool(some) and label_of(some[0][1], card, role) != NO_LABEL
        floats = [x for x, _ in some if isinstance(x, Tensor) and x.is_floating_point()]
        if floats and len({x.shape for x in floats}) == 1:
            check_range(torch.stack(floats), card, role)
        if isinstance(dataset, list):
            files = [pair_of(item, role)[0] for item in dataset]
            check_files([str(file) for file in files if is_path(file)])

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) and labels (N,)."""
        places = [int(index) for index in indices]
        pairs = [self._pair(place) for place in places]
        images = torch.stack([item_as_stored(image, self.card, self.role) for image, _ in pairs])
        labels = [label_of(label, self.card, self.role) for _, label in pairs]
        for place, label in zip(places, labels, strict=True):
            if (label == NO_LABEL) == self.labelled:
                raise DreamkitError(
                    f"{self.role}: image {place} has {'no' if self.labelled else 'a'} label, and "
                    f"others have {'one' if self.labelled else 'none'}: give all of them labels, "
                    "or none"
                )
        return images, to_labels(labels, len(images), self.card, self.role, places)

    def _pair(self, place: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[place]
        except Exception as error:  # anyone's data set
            raise DreamkitError(
                f"{self.role}: item {place} cannot be read ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error
        return pair_of(item, self.role)


def _notes(dataset: Any, card: Card, role: str) -> tuple[str, ...]:
    """Return what there is to say of classes that a data set names in another order."""
    theirs = getattr(dataset, "classes", None)
    ours = card.class_names or tuple(map(str, range(card.num_classes)))
    if not isinstance(theirs, list | tuple) or not all(isinstance(name, str) for name in theirs):
        return ()
    known = [same_name(name) for name in ours]
    for place, name in enumerate(theirs):
        if same_name(name) in known and known.index(same_name(name)) != place:
            return (
                f"{role}: labels are taken as they are, and the data set calls {place} "
                f"'{name}', which is output {known.index(same_name(name))} of {card.name}",
            )
    return ()
