"""Recovery of a network whose single weights were pruned, without its data.

"Data-free recovery after pruning" (arXiv 2511.20702): global unstructured ℓ1 pruning of all
convolutions and linear layers, then distillation on dreams with what is gone kept at zero.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field

from dreamkit.applications.dreaming import images_for, is_own_dreams, student_folder
from dreamkit.applications.measuring import measure_cost, measure_quality
from dreamkit.applications.prune import Recovery
from dreamkit.applications.teaching import train_student
from dreamkit.errors import placed
from dreamkit.pruning.unstructured import kept_at_zero, prune_weights, sparsity_of
from dreamkit.registry import EntryOf
from dreamkit.store.artifact import write_artifact
from dreamkit.training.batches import drawn
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.types import ImageSource, RunContext


@dataclass(frozen=True)
class Recover:
    """Set a share of all weights to zero, then recover by distillation with the zeros kept.

    arXiv 2511.20702. The smallest weights of all convolutions and linear layers together go. Files
    get smaller by it; eager PyTorch gets no faster.

    Args:
        sparsity: share of the weights that goes.
        training: distillation from the teacher.
        recalibration_batches: batches that BatchNorm statistics are recomputed over before the
            accuracy of what pruning left is read; 0 leaves them.
        images: what the network recovers on; this run's own dreams by default.
    """

    sparsity: Annotated[float, Field(gt=0, lt=1)]
    training: Recovery = field(default_factory=Recovery)
    recalibration_batches: Annotated[int, Field(ge=0)] = 16
    images: Annotated[ImageSource | None, EntryOf("sources")] = None

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images)

    def run(self, context: RunContext) -> None:
        """Dream, prune, recover, evaluate and save."""
        teacher = context.teacher
        images = images_for(context, self.images)
        measure_quality(context, "teacher", teacher.model, None)
        student = copy.deepcopy(teacher.model)
        masks = prune_weights(student, self.sparsity)
        if self.recalibration_batches:
            batches, size = self.recalibration_batches, self.training.batch_size
            # Drawn: image folders come sorted by class.
            draws = torch.Generator().manual_seed(context.seed)
            sample = drawn(images, batches * size, draws)
            recalibrate(student, sample, teacher.card, context.device, batches, size)
        measure_quality(context, "pruned", student, images)
        with kept_at_zero(student, masks), placed("training", always=False):
            train_student(context, student, images, self.training, "recovery")
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        context.metrics["student.sparsity"] = sparsity_of(student)
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        write_artifact(student_folder(context), student, card, teacher.builder, teacher.surgery)
