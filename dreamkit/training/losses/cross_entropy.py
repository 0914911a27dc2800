"""The classes of new images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class CrossEntropy(IncrementalLoss):
    """Cross-entropy to the labels of images of new classes, over all classes.

    DeepInversion (Yin et al., CVPR 2020), eq. 11, second term.
    """

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        return F.cross_entropy(step.logits, step.labels)
