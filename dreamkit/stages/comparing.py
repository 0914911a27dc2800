"""How far a network's outputs are from its teacher's, on images that are looked at many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.model_state import eval_mode
from dreamkit.training.batches import NormalisedBatches

_FAR = 1e3
"""Divergence in place of one that is not finite."""


class Comparing:
    """A teacher's outputs on some images, to set those of other networks beside.

    Args:
        teacher: shown the images once, here.
        batches: the images, all of which are looked at each time.
    """

    def __init__(self, teacher: nn.Module, batches: NormalisedBatches) -> None:
        self.batches = batches
        self.theirs = self._logits(teacher)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Return how often a network predicts the teacher's class, and mean KL(p_T ‖ p) in nats."""
        ours = self._logits(model)
        agreement = float((ours.argmax(1) == self.theirs.argmax(1)).float().mean())
        log_p, log_q = F.log_softmax(self.theirs, 1), F.log_softmax(ours, 1)
        apart = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return agreement, float(apart.nan_to_num(nan=_FAR, posinf=_FAR).clamp_min(0))

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        with eval_mode(model):
            return torch.cat([model(x).float().cpu() for x in self.batches])
