"""Data-free knowledge distillation: a student from scratch, taught on dreams.

DeepInversion (Yin et al., CVPR 2020), section 4.4; the loss is eq. 1 with a temperature.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from torch import nn

from dreamkit.errors import placed
from dreamkit.registry import EntryOf
from dreamkit.stages.adaptive import Adaptive, Taught, growing
from dreamkit.stages.dreaming import (
    images_for,
    report_synthesis,
    student_folder,
)
from dreamkit.stages.measuring import measure_cost, measure_quality
from dreamkit.stages.teaching import train_student
from dreamkit.store.artifact import write_artifact
from dreamkit.teachers.checking import check_fits, check_outputs
from dreamkit.training.distillation import Distillation
from dreamkit.training.trainer import lay_out
from dreamkit.types import Images, ImageSource, RunContext, Teacher, TeacherSource


@dataclass(frozen=True)
class Distill(Taught):
    """Teach a student network the teacher's outputs on dreams (or other images).

    DeepInversion, section 4.4.

    Args:
        student: its architecture; it must take the teacher's images and have its outputs.
        training: how it is taught.
        images: what it is taught on; this run's own dreams by default.
        adaptive: dream while the student is taught, against it (Adaptive DeepInversion, with the
            regularizer ``js_compete``; generators); null dreams everything first.
    """

    student: Annotated[TeacherSource, EntryOf("teachers")]
    training: Distillation = field(default_factory=Distillation)
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        self.check_adaptive()

    def make_student(self, context: RunContext) -> Teacher:
        """Return the untrained student on the run's device, with its card and builder.

        Raises:
            DreamkitError: it does not fit the teacher.
        """
        with placed("student"):
            made = self.student.load(context.seed)
            check_outputs(made)
            check_fits(made.card, context.teacher.card)
        made.model.to(context.device)
        return made

    def run(self, context: RunContext) -> None:
        """Dream, teach, evaluate and save."""
        teacher = context.teacher
        made = self.make_student(context)
        student = made.model
        measure_quality(context, "teacher", teacher.model, None)
        images = self._teach(context, student)
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        kept = dataclasses.replace(
            teacher.card,
            name=made.card.name,
            origin=f"distilled from {teacher.card.name}",
            weights_sha256=None,
        )
        write_artifact(student_folder(context), student, kept, made.builder, made.pruning_record)

    def _teach(self, context: RunContext, student: nn.Module) -> Images:
        if self.adaptive is None:
            images = images_for(context, self.images)
            with placed("training", always=False):
                return train_student(context, student, images, self.training, "training")
        lay_out(student, self.training, context.device)  # before it is compiled as a competitor
        with growing(context, student, self.adaptive) as growth:
            growth.check(self.training.total_steps(growth.images))
            with placed("training", always=False):
                images = train_student(context, student, growth, self.training, "training")
            report_synthesis(context, growth.dreams.store)
        return images
