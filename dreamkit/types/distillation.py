"""Distillation: what a student's outputs are held against the teacher's by."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class DistillationLoss(ABC):
    """An entry of ``distillation_losses``: how far a student's outputs are from the teacher's."""

    @abstractmethod
    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss, a scalar of shape ().

        Args:
            student_logits: (N, K); gradients flow to it.
            teacher_logits: (N, K).
            temperature: > 0, of softmaxes; a loss without softmax has no use for it.
        """
