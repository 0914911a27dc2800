"""What the network as it was goes by, kept as far as its last layer weighs it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamkit.types import IncrementalLoss, IncrementalStep
from dreamkit.types.needs import supplied

_LEAST = 1e-8
"""Least variance of logits that differences are a share of."""


@dataclass(frozen=True)
class FeatureDistillation(IncrementalLoss):
    """Importance-weighted feature distillation: ‖W_o (f_k(x) - f_o(x))‖², of images of all classes.

    "Always Be Dreaming" (Smith et al., ICCV 2021), section 5. Features f are what the last layer is
    given, and W_o is that layer as it was: features that the old classes did not go by are free to
    serve new ones, and old outputs need not be right for new ones to be learnt, as the last layer
    in training has no part in it. Here it is averaged over old classes, and a share of the variance
    of the logits that W_o made, so that a weight serves networks of any scale.
    """

    needs = frozenset({"head"})

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        head = supplied(step.head, "head", self)
        wanted = head.old_logits_of(head.old_inputs).detach()
        error = (head.old_logits_of(head.inputs) - wanted).square().mean()
        return error / wanted.var(correction=0).clamp(min=_LEAST)
