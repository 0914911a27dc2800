"""Several sets of images as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import NO_LABEL, Images, Labelled, notes_of


@dataclass(frozen=True)
class JoinedImages:
    """Several sets of images as one, one after the other.

    Args:
        parts: the sets.
        labelled: false to forget the labels of all.
        told: what is to be known of them, beside what the parts tell.
    """

    parts: Sequence[Images]
    labelled: bool = True
    told: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of them."""
        return (*(text for part in self.parts for text in notes_of(part)), *self.told)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        starts = list(itertools.accumulate((len(part) for part in self.parts), initial=0))
        places = [bisect.bisect_right(starts, index) - 1 for index in indices]
        order: list[int] = []
        found = []
        for number, part in enumerate(self.parts):
            mine = [i for i, place in enumerate(places) if place == number]
            if mine:
                found.append(part.batch([indices[i] - starts[number] for i in mine]))
                order += mine
        back = torch.tensor(order).argsort()
        labels = torch.cat([y for _, y in found])[back]
        return torch.cat([x for x, _ in found])[back], (
            labels if self.labelled else torch.full_like(labels, NO_LABEL)
        )


def lacks_labels(images: Images) -> bool:
    """Whether some of a set have no label; where that is not told, whether the first has none."""
    if len(images) == 0:
        return True
    if isinstance(images, JoinedImages) and images.labelled:
        return any(lacks_labels(part) for part in images.parts if len(part))
    labels = images.labels if isinstance(images, Labelled) else images.batch([0])[1]
    return int(labels.min()) == NO_LABEL
