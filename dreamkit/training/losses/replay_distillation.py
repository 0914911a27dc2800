"""What the network as it was says of images of old classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dreamkit.types import IncrementalLoss, IncrementalStep
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class ReplayDistillation(IncrementalLoss):
    """KL(p_o(x̂) ⊕ 0 ‖ p_k(x̂)): on images of old classes nothing is of a new one.

    DeepInversion (Yin et al., CVPR 2020), eq. 11, first term; averaged over the images.

    Args:
        temperature: of both softmaxes; the term is multiplied by its square. The paper's is 1.
    """

    needs = frozenset({"replay"})

    temperature: Annotated[float, Field(gt=0)] = 1.0

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        logits = supplied(step.replay_logits, "replay", self)
        old_logits = supplied(step.replay_old_logits, "replay", self)
        # Over all classes, of which the old ones alone weigh: 0·log 0 is 0.
        ours = F.log_softmax(logits / self.temperature, dim=1)
        theirs = F.log_softmax(old_logits / self.temperature, dim=1)
        kept = ours[:, : theirs.shape[1]]
        return F.kl_div(kept, theirs, reduction="batchmean", log_target=True) * self.temperature**2
