"""Mean squared error of logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.plugin import DistillationLoss


@dataclass(frozen=True)
class MSE(DistillationLoss):
    """Mean squared difference of student's and teacher's logits, which has no temperature.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss, >= 0, of shape ()."""
        return F.mse_loss(student_logits, teacher_logits)
