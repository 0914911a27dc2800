"""What the network as it was says of new images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dreamkit.training.losses.distillation import distillation_loss
from dreamkit.types import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class OldDistillation(IncrementalLoss):
    """KL(p_o(x_k) ‖ p_k(x_k | y ∈ C_o)): among old classes, new images look as they did.

    DeepInversion (Yin et al., CVPR 2020), eq. 11, third term; averaged over the images.

    Args:
        temperature: of both softmaxes; the term is multiplied by its square. The paper's is 1.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        old = step.old_logits.shape[1]
        return distillation_loss(step.logits[:, :old], step.old_logits, self.temperature)
