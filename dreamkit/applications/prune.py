"""Data-free, hardware-aware structured pruning.

DeepInversion (Yin et al., CVPR 2020), section 4.3: channels are ranked on dreams by
I = I_err + η·I_lat (eq. 10), removed step by step, and the network recovers by distillation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from dreamkit.pruning.record import PruningRecord
from dreamkit.registry import EntryOf
from dreamkit.stages.adaptive import Adaptive, TrainsOnImages
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.measuring import measure_latency, measure_quality
from dreamkit.stages.pruning_run import PruningRun
from dreamkit.stages.reconstructing import reconstruct_student
from dreamkit.stages.teaching import Recovery, StudentTraining
from dreamkit.types import Images, ImageSource, Outcome, RunContext, Synthesis, Teacher


@dataclass(frozen=True)
class Prune(ChannelPruning, TrainsOnImages):
    """Remove the least important channels on dreams until a target, then recover by distillation.

    DeepInversion, section 4.3 and eq. 10. With a criterion that measures time, two runs of one
    seed may remove different channels; the run directory's look-up table has what was measured.

    Args:
        recovery: distillation from the teacher after pruning.
        images: what channels are ranked on; this run's own dreams by default.
        adaptive: dream while the pruned network recovers, against it (Adaptive DeepInversion, with
            the regularizer ``js_compete``); null dreams everything first. The first of these
            dreams are made before pruning, and channels are ranked on them.
    """

    recovery: Recovery = field(default_factory=Recovery)
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adaptive()

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream, rank and remove, recover."""
        work = PruningRun(self, teacher, context)
        training = StudentTraining(
            teacher, images, context, self.recovery, self.adaptive, "recovery", "recovery"
        )
        # A copy of the teacher agrees with it: the first dreams against it are DeepInversion's.
        first = training.first_images(self.make_student(teacher, context).model)
        measure_quality("teacher", teacher.model, teacher, None, context)
        work.begin(first)
        work.reach_target()
        student = work.student
        if self.reconstruction is not None and not self.reconstruct_each:
            measure_quality("cut", student, teacher, first, context)
            fit = self.reconstruction
            reconstruct_student(teacher, student, work.cut, first.fitted, fit, context)
        measure_quality("pruned", student, teacher, first, context)
        taught_on = training.run(student, first, work.cut.kept)
        measure_quality("student", student, teacher, taught_on, context)
        if self.target.timed:
            self._check_latency(work, context)
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        pruning_record = work.cut.after(PruningRecord.from_json(teacher.pruning_record)).to_json()
        made = Teacher(student, card, teacher.builder, pruning_record)
        return Outcome(made, taught_on.fitted, same_layers=("pruned",))

    def _check_latency(self, work: PruningRun, context: RunContext) -> None:
        """Measure the finished student, and say so if it misses its latency budget."""
        models = {"teacher": work.teacher.model, "student": work.student}
        measure_latency(models, work.card.input_size, context)
        metrics = context.log.metrics
        student_ms, teacher_ms = metrics["student.latency_ms"], metrics["teacher.latency_ms"]
        metrics["student.latency_budget_ms"] = work.budget.latency_ms(teacher_ms)
        missed = work.budget.missed(student_ms, teacher_ms)
        if missed is not None:
            context.log.failures.append(missed)
