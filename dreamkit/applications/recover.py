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
from torch import nn

from dreamkit.applications.adaptive import Adaptive, Taught
from dreamkit.applications.dreaming import student_folder
from dreamkit.applications.measuring import measure_cost, measure_quality
from dreamkit.applications.prune import Recovery
from dreamkit.applications.reconstructing import Reconstruction, reconstruct_student
from dreamkit.applications.teaching import first_images, go_on_with
from dreamkit.pruning.surgery import Surgery
from dreamkit.pruning.unstructured import kept_at_zero, prune_weights, sparsity_of
from dreamkit.registry import EntryOf
from dreamkit.store.artifact import write_artifact
from dreamkit.training.batches import drawn
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.types import Images, ImageSource, RunContext, Teacher


@dataclass(frozen=True)
class Recover(Taught):
    """Set a share of all weights to zero, then recover by distillation with the zeros kept.

    arXiv 2511.20702. The smallest weights of all convolutions and linear layers together go. Files
    get smaller by it; eager PyTorch gets no faster.

    Args:
        sparsity: share of the weights that goes.
        training: distillation from the teacher.
        recalibration_batches: batches that BatchNorm statistics are recomputed over before the
            accuracy of what pruning left is read; 0 leaves them. Without ``reconstruction`` alone.
        reconstruction: least squares, layer by layer, between what is left and the teacher, before
            the training; null leaves the weights as they are until then.
        images: what the network recovers on; this run's own dreams by default.
        adaptive: dream while the network recovers, against it (Adaptive DeepInversion, with the
            regularizer ``js_compete``); null dreams everything first.
    """

    sparsity: Annotated[float, Field(gt=0, lt=1)]
    training: Recovery = field(default_factory=Recovery)
    recalibration_batches: Annotated[int, Field(ge=0)] = 16
    reconstruction: Reconstruction | None = None
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        self.check_adaptive()

    def make_student(self, context: RunContext) -> Teacher:
        """Return a copy of the teacher without the weights that go."""
        made = dataclasses.replace(context.teacher, model=copy.deepcopy(context.teacher.model))
        prune_weights(made.model, self.sparsity)
        return made

    def run(self, context: RunContext) -> None:
        """Dream, prune, recover, evaluate and save."""
        teacher = context.teacher
        student = copy.deepcopy(teacher.model)
        masks = prune_weights(student, self.sparsity)
        images = first_images(
            context, self.images, self.adaptive, student, self.training, "training"
        )
        measure_quality(context, "teacher", teacher.model, None)
        if self.reconstruction is None:
            self._recalibrate(context, student, images)
        else:
            fit = self.reconstruction
            reconstruct_student(context, student, Surgery(), images, fit, masks)
        measure_quality(context, "pruned", student, images)
        with kept_at_zero(student, masks):
            images = go_on_with(context, student, images, self.adaptive, self.training, "training")
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        context.metrics["student.sparsity"] = sparsity_of(student)
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        write_artifact(student_folder(context), student, card, teacher.builder, teacher.surgery)

    def _recalibrate(self, context: RunContext, student: nn.Module, images: Images) -> None:
        if self.recalibration_batches == 0:
            return
        batches, size = self.recalibration_batches, self.training.batch_size
        # Drawn: image folders come sorted by class.
        sample = drawn(images, batches * size, torch.Generator().manual_seed(context.seed))
        recalibrate(student, sample, context.teacher.card, context.device, batches, size)
