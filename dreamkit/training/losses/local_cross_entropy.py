"""The classes of new images, among new classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class LocalCrossEntropy(IncrementalLoss):
    """Cross-entropy to the labels of images of new classes, over these classes alone.

    "Always Be Dreaming" (Smith et al., ICCV 2021), eq. 8: what tells new classes from one another
    is learnt from their images, and what tells them from old ones is not, as that is mostly what
    tells real images from dreams.
    """

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape (); 0 of a single new class."""
        old = step.old_logits.shape[1]
        return F.cross_entropy(step.logits[:, old:], step.labels - old)
