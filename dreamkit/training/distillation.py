"""Knowledge distillation: a student learns the teacher's outputs on images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dreamkit.errors import DreamkitError
from dreamkit.registry import EntryOf
from dreamkit.training.losses.distillation import (
    KLDivergence,
    mixed_cross_entropy,
)
from dreamkit.training.options import Training
from dreamkit.training.reading import Batch
from dreamkit.training.trainer import Trainer
from dreamkit.types import NO_LABEL, DistillationLoss


@dataclass(frozen=True)
class Distillation(Training):
    """Distillation: how a student is taught.

    Hinton et al. 2015; DeepInversion (Yin et al., CVPR 2020), eq. 1 and section 4.1.

    Args:
        soft_loss: what is to be as the teacher's: ``kl``, the softmax's probabilities (eq. 1), or
            ``l1``, the logits, by their mean absolute difference (Fang et al. 2019). The gradient
            of ``l1`` is smaller: it wants some four times the learning rate of ``kl``, and a
            quarter of its weight decay.
        temperature: of the softmax, τ in eq. 1; ``l1`` has none.
        hard_labels: weight of the cross-entropy to the images' own labels; the distillation loss
            has the rest.
    """

    soft_loss: Annotated[DistillationLoss, EntryOf("distillation_losses")] = field(
        default_factory=KLDivergence
    )
    temperature: Annotated[float, Field(gt=0)] = 3.0
    hard_labels: Annotated[float, Field(ge=0, le=1)] = 0.0


class Distiller(Trainer[Distillation]):
    """A student that learns the teacher's outputs on one set of images.

    Args:
        arguments: those of ``Trainer``; the student has the teacher's outputs.
    """

    def loss(self, *batches: Batch) -> Tensor:
        """Return the distillation loss, mixed with the labels' cross-entropy where that is asked.

        Raises:
            DreamkitError: ``hard_labels`` of images without labels.
        """
        ((stored, labels),) = batches
        if self.options.hard_labels and int(labels.min()) == NO_LABEL:
            raise DreamkitError("these images have no labels; set it to 0", ("hard_labels",))
        mixed = self.augmenter(self.card.normalise(stored), labels)
        student_logits, teacher_logits = self.forward(mixed.images)
        options = self.options
        soft = options.soft_loss(student_logits, teacher_logits, options.temperature)
        if self.options.hard_labels == 0:
            return soft
        hard = mixed_cross_entropy(student_logits, mixed)
        return (1 - self.options.hard_labels) * soft + self.options.hard_labels * hard
