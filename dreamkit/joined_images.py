"""Several sets of images as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import Images


@dataclass(frozen=True)
class JoinedImages:
    """Several sets of images as one, one after the other."""

    parts: Sequence[Images]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

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
        return torch.cat([x for x, _ in found])[back], torch.cat([y for _, y in found])[back]
