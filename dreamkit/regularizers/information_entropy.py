"""Balance of the classes in a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import InversionStep, Regularizer


@dataclass(frozen=True)
class InformationEntropy(Regularizer):
    """Minus the entropy of the batch's mean prediction: asks for every class equally often.

    Data-Free Learning of student networks (DAFL, Chen et al., ICCV 2019), L_ie. Logarithms are
    decimal, as in the authors' code, whose weight of 5 is for these; it lies in [-log10 K, 0] for
    K classes.
    """

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        mean = F.softmax(step.teacher_logits, dim=1).mean(0)
        return torch.xlogy(mean, mean.clamp(min=1e-30)).sum() / math.log(10)
