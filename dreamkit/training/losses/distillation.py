"""Losses between a student and its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.training.augmenter import Mixed
from dreamkit.types import DistillationLoss


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(p_T ‖ p_S) at a temperature, times its square, averaged over the batch.

    Hinton et al. 2015; DeepInversion eq. 1. The square keeps the gradient's scale the same for
    every temperature.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K).
        temperature: > 0.
    """
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class KLDivergence(DistillationLoss):
    """KL divergence of the student's softmax from the teacher's, at a temperature.

    Hinton et al. 2015; DeepInversion (Yin et al., CVPR 2020), eq. 1.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss, >= 0, of shape ()."""
        return distillation_loss(student_logits, teacher_logits, temperature)


@dataclass(frozen=True)
class LogitDistance(DistillationLoss):
    """Mean absolute difference of the logits, over classes and batch.

    Fang et al. 2019 (Data-Free Adversarial Distillation). Its gradient stays as large for
    images that both networks are sure of, where that of the softmax vanishes. There is no softmax,
    and no temperature.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss, >= 0, of shape ()."""
        return F.l1_loss(student_logits, teacher_logits)


def mixed_cross_entropy(logits: Tensor, mixed: Mixed) -> Tensor:
    """Return the cross-entropy (N, K) to both labels of mixed images, by their shares.

    Zhang et al. 2018; for images that are not mixed it is the plain one.
    """
    own, other = (
        F.cross_entropy(logits, labels, reduction="none") for labels in (mixed.labels, mixed.others)
    )
    return (mixed.share * own + (1 - mixed.share) * other).mean()
