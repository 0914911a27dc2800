"""Competition between teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import InversionStep, Regularizer
from dreamkit.types.needs import supplied

_REFERENCE_TEMPERATURE = 3.0
_REFERENCE_CLAMP = (0.01, 0.99)


@dataclass(frozen=True)
class JSCompete(Regularizer):
    """One minus the Jensen-Shannon divergence between teacher and student: seeks disagreement.

    Adaptive DeepInversion (Yin et al., CVPR 2020), R_compete of eq. 8, in nats, averaged over
    the batch; it lies in [1 - ln 2, 1].

    Args:
        form: ``paper`` is eq. 8. ``reference`` is what the authors' code computes:
            ½KL(M‖P) + ½KL(M‖Q) with softmax at temperature 3 and probabilities clamped to
            [0.01, 0.99]; with many classes the clamp leaves no gradient.
    """

    form: Literal["paper", "reference"] = "paper"

    needs = frozenset({"student_logits"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        student_logits = supplied(step.student_logits, "student_logits", self)
        if self.form == "paper":
            return 1 - jensen_shannon(step.teacher_logits, student_logits)
        return 1 - _reference_divergence(step.teacher_logits, student_logits).clamp(0, 1)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return JS(p_T, p_S) in nats, averaged over the batch; in [0, ln 2]."""
    log_p = F.log_softmax(teacher_logits, dim=1)
    log_q = F.log_softmax(student_logits, dim=1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(1)
    return (0.5 * (kl_p + kl_q)).mean()


def _reference_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    low, high = _REFERENCE_CLAMP
    p = F.softmax(teacher_logits / _REFERENCE_TEMPERATURE, dim=1)
    q = F.softmax(student_logits / _REFERENCE_TEMPERATURE, dim=1)
    m = (0.5 * (p + q)).clamp(low, high)
    p, q = p.clamp(low, high), q.clamp(low, high)
    kl_p = (m * (m.log() - p.log())).sum(1)
    kl_q = (m * (m.log() - q.log())).sum(1)
    return (0.5 * (kl_p + kl_q)).mean()
