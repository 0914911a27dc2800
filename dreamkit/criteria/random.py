"""Chance: what any criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import Criterion, PruningStep


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random importance, the baseline of every comparison; the recipe's seed fixes it."""

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return numbers in [0, 1), one tensor (channels,) for each group."""
        return [torch.rand(group.channels, generator=step.generator) for group in step.groups]
