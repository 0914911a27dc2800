"""The true classes of images of old classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.errors import DreamkitError
from dreamkit.types import NO_LABEL, IncrementalLoss, IncrementalStep
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class ReplayCrossEntropy(IncrementalLoss):
    """Cross-entropy to the labels of images of old classes, over all classes.

    The oracle that classifies of DeepInversion's Table 7.
    """

    needs = frozenset({"replay"})

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ().

        Raises:
            DreamkitError: an image has no label.
        """
        logits = supplied(step.replay_logits, "replay", self)
        labels = supplied(step.replay_labels, "replay", self)
        if bool((labels == NO_LABEL).any()):
            raise DreamkitError("replay_cross_entropy: images of old classes have no labels")
        return F.cross_entropy(logits, labels)
