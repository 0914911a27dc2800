"""Certainty of the teacher, whatever the class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import InversionStep, Regularizer


@dataclass(frozen=True)
class OneHot(Regularizer):
    """Cross-entropy to the teacher's own choice: asks for images that it is sure of.

    Data-Free Learning of student networks (DAFL, Chen et al., ICCV 2019), L_oh.
    """

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        return F.cross_entropy(step.teacher_logits, step.teacher_logits.argmax(1))
