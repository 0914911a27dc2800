"""Disagreement between teacher and student, sought where they agree on the class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import InversionStep, Regularizer
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class Adversarial(Regularizer):
    """Minus the divergence of a student from the teacher: makes images that it has yet to learn.

    The loss of boundary-supporting adversaries in Contrastive Model Inversion (Fang et al., IJCAI
    2021) and FastDFKD (Fang et al., AAAI 2022): -KL(p_T ‖ p_S) of the images that both put into
    one class, 0 for the others, averaged over the batch; at most 0. Where they disagree already
    there is no call for more.
    """

    needs = frozenset({"student_logits"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        student_logits = supplied(step.student_logits, "student_logits", self)
        log_p = F.log_softmax(student_logits, dim=1)
        log_q = F.log_softmax(step.teacher_logits, dim=1)
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        agreed = student_logits.argmax(1) == step.teacher_logits.argmax(1)
        return -(divergence * agreed).mean()
