"""The grey-world prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from dreamkit.plugin import Field, InversionStep, Regularizer


@dataclass(frozen=True)
class ColorBalance(Regularizer):
    """Distance of the batch's mean colour from the training data's: the grey-world prior.

    Normalised images of the training data average to 0 in every channel; the term is the mean
    over channels of |mean of the batch|^power.

    Args:
        power: 2 pulls hardest at the channel that is furthest off, 1 at all of them alike.
    """

    power: Annotated[float, Field(ge=1, le=4)] = 2.0

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        channel_means = step.images.mean(dim=(0, 2, 3))
        return channel_means.abs().pow(self.power).mean()
