"""The classes of all images, learnt by the last layer alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dreamkit.errors import DreamkitError
from dreamkit.types import NO_LABEL, IncrementalLoss, IncrementalStep
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class HeadCrossEntropy(IncrementalLoss):
    """Cross-entropy over all classes of images of all classes, whose gradient the last layer has.

    "Always Be Dreaming" (Smith et al., ICCV 2021), section 5, the fine-tuning of the last layer:
    features do not learn from it to tell real images from dreams. New and old classes weigh by how
    many there are of them, not by how many images of them a step has.
    """

    needs = frozenset({"head", "replay"})

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ().

        Raises:
            DreamkitError: an image of old classes has no label.
        """
        head = supplied(step.head, "head", self)
        old_labels = supplied(step.replay_labels, "replay", self)
        if bool((old_labels == NO_LABEL).any()):
            raise DreamkitError("head_cross_entropy: images of old classes have no labels")
        logits = head.logits_of(head.inputs.detach())
        new, old = logits.split([len(step.labels), len(old_labels)])
        share = step.old_logits.shape[1] / logits.shape[1]
        of_new, of_old = F.cross_entropy(new, step.labels), F.cross_entropy(old, old_labels)
        return (1 - share) * of_new + share * of_old
