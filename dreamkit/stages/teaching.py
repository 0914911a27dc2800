"""Teaching a student within a run: on images that are there, or dreamed against it meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from dreamkit.copying import copied
from dreamkit.errors import placed
from dreamkit.model_state import frozen, seeded
from dreamkit.stages.adaptive import Adaptive, AdaptivePool, adaptive_pool
from dreamkit.stages.dreaming import images_of
from dreamkit.stages.run_store import report_synthesis
from dreamkit.stages.samples import Parts, parted, what_is_held_back
from dreamkit.stages.training_run import TrainingRun
from dreamkit.training.augmenter import check_window
from dreamkit.training.difference_statistics import Kept
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.training.layout import lay_out
from dreamkit.training.trainer import Trainer
from dreamkit.types import Images, RunContext, Synthesis, Teacher


@dataclass(frozen=True)
class Recovery(Distillation):
    """Distillation with defaults for a network that is nearly right already.

    It is taught by the teacher's features more than by its logits, with the BatchNorm statistics
    that pruning left. SGD diverges where BatchNorm is frozen, at rates that teach; AdamW does not.
    """

    temperature: Annotated[float, Field(gt=0)] = 5.0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    features: Annotated[float, Field(ge=0)] = 100.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    freeze_bn: bool = True
    dropout: bool = False


def trainable_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network all of whose weights learn, whatever of it its owner froze."""
    return copied(model).requires_grad_(True)


def train_student(
    teacher: Teacher,
    student: nn.Module,
    images: Images | AdaptivePool,
    options: Distillation,
    context: RunContext,
    stage: str,
    resumable: bool = True,
    kept: Kept = MappingProxyType({}),
) -> Images:
    """Distil a teacher into ``student``, reporting under ``stage``.

    Args:
        teacher: whose outputs are taught.
        student: on the run's device; trained in place and left in eval mode.
        images: fixed, or dreamed while the student is taught.
        options: how.
        context: the run's.
        stage: what it is called in records and reports.
        resumable: as of ``teach``.
        kept: which of the teacher's channels the student has.

    Returns:
        The images that it was taught on.
    """
    count = images.images if isinstance(images, AdaptivePool) else len(images)
    with context.log.progress("preparing", 1):  # it looks for features to compare
        trainer = Distiller(
            student,
            teacher.model,
            teacher.card,
            options,
            context.device,
            context.seed,
            options.total_steps(count),
            context.log.note,
            kept,
        )
    return teach(trainer, [images], context, stage, resumable)[0]


def teach(
    trainer: Trainer[Any],
    sets: Sequence[Images | AdaptivePool],
    context: RunContext,
    stage: str,
    resumable: bool = True,
) -> list[Images]:
    """Let a trainer take all of its steps, reporting under ``stage``.

    Adds to ``training.seconds`` and ``training.steps``.

    Args:
        trainer: at its beginning.
        sets: of images, from each of which a step takes a batch; one of them may be adaptive.
        context: the run's.
        stage: what it is called in records and reports.
        resumable: keep checkpoints, and go on from one. The student must then be the same in
            every try of the run.

    Returns:
        The sets, each as it was in the end.
    """
    path = context.folder / RunContext.CHECKPOINTS / f"{stage}.safetensors"
    with frozen(trainer.teacher), seeded(context.seed, context.device):
        training = TrainingRun(context, trainer, sets, stage, path if resumable else None)
        training.run()
    return training.pools


@dataclass(frozen=True)
class StudentTraining:
    """How a student is trained in an application, on images that are there or on dreams to come.

    Args:
        teacher: whose outputs are taught; also what is inverted.
        images: given, or to be dreamed.
        context: the run's.
        options: how the student is trained.
        adaptive: the rhythm of dreams that are made against the student; None dreams all first.
        stage: what the training is called in records and reports.
        place: where its options stand in the application, for messages.
    """

    teacher: Teacher
    images: Images | Synthesis | None
    context: RunContext
    options: Distillation
    adaptive: Adaptive | None
    stage: str
    place: str

    def check(self) -> None:
        """Refuse windows of images that the teacher does not take.

        Raises:
            DreamkitError: of ``first_images``.
        """
        network, card = self.teacher.model, self.teacher.card
        with placed(self.place, always=False):
            check_window(self.options.augmentation, network, "teacher", card, self.context.device)

    def first_images(self, student: nn.Module) -> Parts:
        """Return the images that there are before the training, with those that are held back.

        Args:
            student: what the first dreams are made against.

        Raises:
            DreamkitError: there are none, the training is too short for all dreams, or the teacher
                takes no such windows of them as it is to train on.
        """
        self.check()  # before anything is dreamed
        if self.adaptive is None:
            images = images_of(self.teacher, self.images, self.context)
            return parted(images, self.context.seed, self.context.log.note)
        with self._pool(student, self.adaptive) as pool:
            self.context.log.note(what_is_held_back(pool.planned, len(pool.held)))
            pool.check(self.options.total_steps(pool.images), self.place)
            pool.dream()
        return pool.parts

    def run(
        self,
        student: nn.Module,
        first: Parts | None = None,
        kept: Kept = MappingProxyType({}),
    ) -> Parts:
        """Train a student.

        Args:
            student: as ``train_student`` takes it.
            first: from ``first_images``; None to begin with these here.
            kept: which of the teacher's channels it has.

        Returns:
            The images that it was taught on, with those that were held back.
        """
        if self.adaptive is None:
            parts = self.first_images(student) if first is None else first
            self._train(student, parts.fitted, kept)
            return parts
        lay_out(student, self.options, self.context.device)  # before it is compiled as a competitor
        with self._pool(student, self.adaptive) as pool:
            if first is None:
                self.context.log.note(what_is_held_back(pool.planned, len(pool.held)))
                pool.check(self.options.total_steps(pool.images), self.place)
            else:
                pool.restore(min(self.adaptive.batches, len(pool.dreams.plans)))
            self._train(student, pool, kept)
            report_synthesis(self.context, pool.dreams.store, self.teacher)
        return pool.parts

    def _train(self, student: nn.Module, images: Images | AdaptivePool, kept: Kept) -> None:
        with placed(self.place, always=False):
            train_student(
                self.teacher,
                student,
                images,
                self.options,
                self.context,
                self.stage,
                kept=kept,
            )

    def _pool(self, student: nn.Module, adaptive: Adaptive) -> AbstractContextManager[AdaptivePool]:
        return adaptive_pool(
            self.teacher, self.images, self.context, student, adaptive, compared=True
        )
