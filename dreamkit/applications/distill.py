"""Data-free knowledge distillation: a student from scratch, taught on dreams.

DeepInversion (Yin et al., CVPR 2020), section 4.4; the loss is eq. 1 with a temperature.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from dreamkit.applications.dreaming import images_for, is_own_dreams, student_folder
from dreamkit.applications.measuring import measure_cost, measure_quality
from dreamkit.applications.teaching import train_student
from dreamkit.errors import DreamkitError, placed
from dreamkit.registry import EntryOf
from dreamkit.store.artifact import write_artifact
from dreamkit.teachers.checking import check_outputs
from dreamkit.training.distillation import Distillation
from dreamkit.types import ImageSource, RunContext, TeacherSource


@dataclass(frozen=True)
class Distill:
    """Teach a student network the teacher's outputs on dreams (or other images).

    DeepInversion, section 4.4.

    Args:
        student: its architecture; it must take the teacher's images and have its outputs.
        training: how it is taught.
        images: what it is taught on; this run's own dreams by default.
    """

    student: Annotated[TeacherSource, EntryOf("teachers")]
    training: Distillation = Distillation()  # noqa: RUF009
    images: Annotated[ImageSource | None, EntryOf("sources")] = None

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images)

    def run(self, context: RunContext) -> None:
        """Dream, teach, evaluate and save."""
        teacher, card = context.teacher, context.teacher.card
        with placed("student"):
            made = self.student.load(context.seed)
            check_outputs(made)
        student = made.model.to(context.device)
        if made.card.num_classes != card.num_classes or made.card.input_size != card.input_size:
            raise DreamkitError(
                f"the student {made.card.name} takes {made.card.input_size} and has "
                f"{made.card.num_classes} outputs; the teacher {card.name} takes "
                f"{card.input_size} and has {card.num_classes}",
                ("student",),
            )
        images = images_for(context, self.images)
        measure_quality(context, "teacher", teacher.model, None)
        with placed("training", always=False):
            train_student(context, student, images, self.training, "training")
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        kept = dataclasses.replace(
            card, name=made.card.name, origin=f"distilled from {card.name}", weights_sha256=None
        )
        write_artifact(student_folder(context), student, kept, made.builder, {})
