"""Data-free, hardware-aware structured pruning.

DeepInversion (Yin et al., CVPR 2020), section 4.3: channels are ranked on dreams by
I = I_err + η·I_lat (eq. 10), removed step by step, and the network recovers by distillation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import nn

from dreamkit.errors import OptionError, TeacherMismatch, placed
from dreamkit.pruning.record import PruningRecord
from dreamkit.registry import EntryOf
from dreamkit.resizing import TakesResized, for_card
from dreamkit.stages.adaptive import Adaptive, TrainsOnImages
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.measuring import measure_latency, measure_quality, measure_size, sized
from dreamkit.stages.pruning_run import PruningRun
from dreamkit.stages.reconstructing import reconstruct_student
from dreamkit.stages.samples import Parts
from dreamkit.stages.teaching import Recovery, StudentTraining
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import Images, ImageSource, Outcome, RunContext, Synthesis, Teacher


@dataclass(frozen=True)
class Prune(ChannelPruning, TrainsOnImages):
    """Remove the least important channels on dreams until a target, then recover by distillation.

    DeepInversion, section 4.3 and eq. 10. With a criterion that measures time, two runs of one
    seed may remove different channels; the run directory's look-up table has what was measured.

    Args:
        image_size: side of the images that the student takes, where they are to be smaller than the
            teacher's: that saves FLOPs in all layers at once, which the target counts. The images
            are scaled, and channels go as far as it then still asks for.
        recovery: distillation from the teacher after pruning.
        images: what channels are ranked on; this run's own dreams by default.
        adaptive: dream while the pruned network recovers, against it (Adaptive DeepInversion, with
            the regularizer ``js_compete``); null dreams everything first. The first of these
            dreams are made before pruning, and channels are ranked on them.
    """

    image_size: Annotated[int, Field(ge=1)] | None = None
    recovery: Recovery = field(default_factory=Recovery)
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adaptive()
        if self.image_size is not None and self.adaptive is not None:
            raise OptionError(
                "image_size",
                "set 'adaptive' to null: dreams made while a network recovers are of the teacher's "
                "own size",
            )

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream, rank and remove, recover."""
        small = self._on_smaller_images(teacher)
        within = self._seeing(small, teacher, context)
        work = PruningRun(self, small, within, teacher)
        dreaming = StudentTraining(
            teacher, images, context, self.recovery, self.adaptive, "recovery", "recovery"
        )
        training = dataclasses.replace(dreaming, teacher=small, context=within)
        training.check()
        if self.finetune is not None:
            dataclasses.replace(training, options=self.finetune, place="finetune").check()
        # A copy of the teacher agrees with it: the first dreams against it are DeepInversion's.
        first = dreaming.first_images(self.make_student(teacher, context).model)
        measure_quality("teacher", teacher.model, teacher, None, context)
        if self.image_size is not None:
            measure_size({"resized": sized(small)}, context)
            self._measure("resized", small.model, teacher, first, context)
        seen = first.for_card(teacher.card, small.card)
        work.begin(seen)
        work.reach_target()
        student = work.student
        if self.reconstruction is not None and not self.reconstruct_each:
            self._measure("cut", student, teacher, first, context)
            fit = self.reconstruction
            reconstruct_student(small, student, work.cut, seen.fitted, fit, within)
        self._measure("pruned", student, teacher, first, context)
        taught_on = training.run(student, seen, work.cut.kept)
        compared = taught_on if self.image_size is None else first
        self._measure("student", student, teacher, compared, context)
        card = dataclasses.replace(
            small.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        pruning_record = work.cut.after(PruningRecord.from_json(teacher.pruning_record)).to_json()
        made = Teacher(student, card, teacher.builder, pruning_record)
        if self.target.timed:
            self._check_latency(work, made, teacher, context)
        return Outcome(made, taught_on.fitted, same_layers=("pruned",))

    def _on_smaller_images(self, teacher: Teacher) -> Teacher:
        """Return the teacher as one that takes images of ``image_size``.

        Raises:
            TeacherMismatch: it does not, or its own are no larger, or not square.
        """
        if self.image_size is None:
            return teacher
        channels, height, width = teacher.card.input_size
        if height != width or self.image_size >= height:
            raise TeacherMismatch(
                "image_size is the side of images smaller than the teacher's, and "
                f"{teacher.card.name} takes {height}x{width}",
                ("image_size",),
            )
        size = (channels, self.image_size, self.image_size)
        small = dataclasses.replace(
            teacher, card=dataclasses.replace(teacher.card, input_size=size)
        )
        with placed("image_size"):
            check_outputs(small)
        return small

    def _seeing(self, small: Teacher, teacher: Teacher, context: RunContext) -> RunContext:
        """Return the run's context with evaluation images as the student takes them."""
        if context.evaluation is None:
            return context
        evaluation = for_card(context.evaluation, teacher.card, small.card)
        return dataclasses.replace(context, evaluation=evaluation)

    def _measure(
        self, name: str, model: nn.Module, teacher: Teacher, parts: Parts, context: RunContext
    ) -> None:
        """Measure a network on what its user has: images of the teacher's size."""
        if self.image_size is not None:
            model = TakesResized(model, (self.image_size, self.image_size))
        measure_quality(name, model, teacher, parts, context)

    def _check_latency(
        self, work: PruningRun, student: Teacher, teacher: Teacher, context: RunContext
    ) -> None:
        """Measure the finished student, and say so if it misses its latency budget."""
        measure_latency({"teacher": sized(teacher), "student": sized(student)}, context)
        metrics = context.log.metrics
        student_ms, teacher_ms = metrics["student.latency_ms"], metrics["teacher.latency_ms"]
        metrics["student.latency_budget_ms"] = work.budget.latency_ms(teacher_ms)
        missed = work.budget.missed(student_ms, teacher_ms)
        if missed is not None:
            context.log.failures.append(missed)
