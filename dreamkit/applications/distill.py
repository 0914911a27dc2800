"""Data-free knowledge distillation: a student from scratch, taught on dreams.

DeepInversion (Yin et al., CVPR 2020), section 4.4; the loss is eq. 1 with a temperature.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from dreamkit.errors import placed
from dreamkit.registry import EntryOf
from dreamkit.stages.adaptive import Adaptive, TrainsOnImages
from dreamkit.stages.measuring import measure_quality
from dreamkit.stages.teaching import StudentTraining
from dreamkit.teachers.checking import check_fits
from dreamkit.teachers.intake import admit
from dreamkit.training.difference_statistics import check_made_from
from dreamkit.training.distillation import Distillation
from dreamkit.types import (
    Images,
    ImageSource,
    Outcome,
    RunContext,
    Synthesis,
    Teacher,
    TeacherSource,
)


@dataclass(frozen=True)
class Distill(TrainsOnImages):
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

    def make_student(self, teacher: Teacher, context: RunContext) -> Teacher:
        """Return the untrained student on the run's device, with its card and builder.

        Raises:
            DreamkitError: it does not fit the teacher.
        """
        with placed("student"), context.log.progress("loading the student", 1):
            loaded = self.student.load(context.seed)
            loaded.model.to(context.device)
            made = admit(loaded, context.log.note, "the student", learnt=False)
            check_fits(made.card, teacher.card)
        if self.training.statistics == "difference":
            with placed("training"):
                check_made_from(made.model, teacher.model, {})
        made.model.requires_grad_(True)  # whatever of it its owner froze
        return made

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream and teach."""
        made = self.make_student(teacher, context)
        measure_quality("teacher", teacher.model, teacher, None, context)
        training = StudentTraining(
            teacher, images, context, self.training, self.adaptive, "training", "training"
        )
        taught_on = training.run(made.model)
        measure_quality("student", made.model, teacher, taught_on, context)
        card = dataclasses.replace(
            teacher.card,
            name=made.card.name,
            origin=f"distilled from {teacher.card.name}",
            weights_sha256=None,
        )
        return Outcome(dataclasses.replace(made, card=card), taught_on.fitted)
