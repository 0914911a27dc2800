"""Learning without forgetting, for many classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class LwFMC(IncrementalLoss):
    """Each class on its own: what the network as it was says of old ones, the truth of new ones.

    LwF.MC: Rebuffi et al., iCaRL, CVPR 2017, section 3.3 and its baseline without exemplars (after
    Li and Hoiem 2016). Binary cross-entropy of σ(logit), summed over the classes and averaged over
    the images of new classes; the only loss of a training.
    """

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the loss, >= 0, of shape ()."""
        targets = torch.zeros_like(step.logits)
        targets[:, : step.old_logits.shape[1]] = step.old_logits.sigmoid()
        targets.scatter_(1, step.labels[:, None], 1.0)
        total = F.binary_cross_entropy_with_logits(step.logits, targets, reduction="sum")
        return total / len(step.logits)
