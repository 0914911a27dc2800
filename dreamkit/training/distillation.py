"""Knowledge distillation: a student learns the teacher's outputs on images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from dreamkit.errors import DreamkitError
from dreamkit.training.hints import Hints
from dreamkit.training.losses.distillation import distillation_loss, mixed_cross_entropy
from dreamkit.training.trainer import Batch, Trainer, Training
from dreamkit.types import NO_LABEL, Images


@dataclass(frozen=True)
class Distillation(Training):
    """Distillation: how a student is taught.

    Hinton et al. 2015; DeepInversion (Yin et al., CVPR 2020), eq. 1 and section 4.1.

    Args:
        temperature: of the softmax, τ in eq. 1.
        hard_labels: weight of the cross-entropy to the images' own labels; the distillation loss
            has the rest.
    """

    temperature: Annotated[float, Field(gt=0)] = 3.0
    hard_labels: Annotated[float, Field(ge=0, le=1)] = 0.0


class Distiller(Trainer[Distillation]):
    """A student that learns the teacher's outputs on one set of images.

    Args:
        arguments: those of ``Trainer``; the student has the teacher's outputs.
        hints: from the teacher's layers, where the student has them; None teaches by outputs alone.
        named: as of ``arguments``.
    """

    def __init__(self, *arguments: Any, hints: Hints | None = None, **named: Any) -> None:
        self.hints = hints
        super().__init__(*arguments, **named)
        if hints is not None:
            hints.attach()

    def _outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = super()._outputs(images)
        return logits if self.hints is None else (*logits, self.hints.difference())

    def finish(self, images: Images) -> None:
        """Leave the student as it is to be used, in eval mode, as ``Trainer`` does."""
        if self.hints is not None:
            self.hints.detach()
        super().finish(images)

    def loss(self, *batches: Batch) -> Tensor:
        """Return the distillation loss, mixed with the labels' cross-entropy where that is asked.

        Raises:
            DreamkitError: ``hard_labels`` of images without labels.
        """
        ((stored, labels),) = batches
        if self.options.hard_labels and int(labels.min()) == NO_LABEL:
            raise DreamkitError("these images have no labels; set it to 0", ("hard_labels",))
        mixed = self.augmenter(self.card.normalise(stored), labels)
        if self.hints is None:
            student_logits, teacher_logits = self.forward(mixed.images)
        else:
            with self.hints.listening():
                student_logits, teacher_logits, difference = self.forward(mixed.images)
        loss = distillation_loss(student_logits, teacher_logits, self.options.temperature)
        if self.options.hard_labels:
            hard = mixed_cross_entropy(student_logits, mixed)
            loss = (1 - self.options.hard_labels) * loss + self.options.hard_labels * hard
        return loss if self.hints is None else loss + self.hints.weight * difference
