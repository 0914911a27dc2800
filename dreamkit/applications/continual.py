"""Data-free continual learning: a network learns new classes and keeps the old ones, without data.

DeepInversion (Yin et al., CVPR 2020), section 4.5: old classes are dreamed from the network as it
is, and it is trained on these dreams and on images of the new classes (eq. 11).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from dreamkit import distributed
from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.model_state import load_state
from dreamkit.pruning.head import find_head
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.seeds import stream
from dreamkit.stages.adaptive import Adaptive, AdaptivePool, adaptive_pool, check_rhythm
from dreamkit.stages.batches import batch_seed, known_batches
from dreamkit.stages.course import Course, NewClasses, StepLog, check_size, with_classes
from dreamkit.stages.dreaming import images_of
from dreamkit.stages.refreshing import refresh_statistics
from dreamkit.stages.retention import Retention
from dreamkit.stages.run_store import report_synthesis
from dreamkit.stages.teaching import teach
from dreamkit.store.artifact import SPECIFICATION, read_artifact, write_artifact
from dreamkit.store.atomic import write_json
from dreamkit.store.source import Dreams, is_own_dreams
from dreamkit.teachers.weights import hash_weights
from dreamkit.training.batches import drawn_by_class
from dreamkit.training.incremental import (
    FirstOutputs,
    IncrementalTrainer,
    IncrementalTraining,
    check_losses,
)
from dreamkit.training.layout import lay_out
from dreamkit.training.losses.cross_entropy import CrossEntropy
from dreamkit.training.losses.old_distillation import OldDistillation
from dreamkit.training.losses.replay_distillation import ReplayDistillation
from dreamkit.training.statistics import Statistics
from dreamkit.types import (
    Application,
    Images,
    ImageSource,
    IncrementalLoss,
    Outcome,
    RunContext,
    Synthesis,
    Teacher,
)

STEPS = "steps"
METRICS = "metrics.json"
"""Beside a step's student: what the step took."""
SUMMED = {"synthesis.images", "synthesis.seconds", "training.seconds", "training.steps"}
BASE = "base"
"""What the teacher's own classes are called in reports."""
EQUATION_11 = (
    Term[IncrementalLoss]("replay_distillation", 1.0, ReplayDistillation()),
    Term[IncrementalLoss]("cross_entropy", 1.0, CrossEntropy()),
    Term[IncrementalLoss]("old_distillation", 1.0, OldDistillation()),
)


@dataclass(frozen=True)
class Continual(Application):
    """Teach a network new classes, set by set, while it keeps the old ones without their data.

    DeepInversion, section 4.5 and eq. 11. The teacher's classes are called ``base`` in reports, and
    are evaluated on the recipe's ``evaluation``. What the network is after each set is kept under
    ``steps``, and dreams are made anew from it.

    Args:
        sets: the new classes, in the order in which they come.
        training: how each set is learnt.
        losses: the weighted terms of what is lowered; eq. 11 by default.
        replay: what stands for the images of old classes: this run's own dreams by default; a
            source of real images of the teacher's classes (the paper's oracles), to which those of
            earlier sets are added; null for none (LwF.MC, plain fine-tuning).
        images_per_class: of each old class. It decides how much is dreamed, whatever the
            synthesizer's ``images`` says.
        adaptive: dream while the network learns, against it (Adaptive DeepInversion, with the
            regularizer ``js_compete``); null dreams everything first.
        refresh_bn: after each set, let BatchNorm state what it is given of all classes, without
            changing what the network computes: the next dreams are held to it. Of the old classes
            ``difference`` takes what the network stated before, moved by what it sees differently
            of the images that stand for theirs, and ``recalibrate`` what it sees of these; ``keep``
            leaves the statistics as they were.
    """

    images_option: ClassVar[str] = "replay"

    sets: tuple[NewClasses, ...]
    training: IncrementalTraining = field(default_factory=IncrementalTraining)
    losses: Annotated[tuple[Term[IncrementalLoss], ...], TermsOf("losses")] = EQUATION_11
    replay: Annotated[ImageSource | None, EntryOf("sources")] = field(default_factory=Dreams)
    images_per_class: Annotated[int, Field(ge=1)] = 250
    adaptive: Adaptive | None = None
    refresh_bn: Statistics = "difference"

    def __post_init__(self) -> None:
        if not self.sets:
            raise OptionError("sets", "give at least one set of new classes")
        names = self.names
        if len({BASE, *names}) <= len(names):
            raise OptionError(
                "sets",
                f"two have one name, or one is called '{BASE}', as the teacher's classes are",
            )
        check_losses(self.losses, self.replay, self.training)
        if self.adaptive is not None and not self.needs_synthesis:
            raise OptionError("adaptive", "it dreams, so 'replay' must be dreams of this run")

    @property
    def names(self) -> list[str]:
        """What the sets are called."""
        return [added.name or f"set{number}" for number, added in enumerate(self.sets, 1)]

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams."""
        return self.replay is not None and is_own_dreams(self.replay)

    @property
    def trains_student(self) -> bool:
        """Whether dreams are made against the network in training."""
        return self.adaptive is not None

    def planned(
        self, teacher: Teacher, synthesis: Synthesis, context: RunContext
    ) -> tuple[Synthesis, RunContext]:
        """Return dreams that cost what those of all steps do."""
        course = Course(self.sets, self.names, teacher.card, context.log)
        course.check_replay(synthesis.synthesizer)
        images = self.images_per_class * sum(course.old_classes)
        folder = context.folder / STEPS / "1"
        return synthesis.of(images), dataclasses.replace(context, folder=folder)

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Learn set after set; evaluate after each."""
        learning = _Learning(self, teacher, images, context)
        retention = Retention(teacher.card, context)
        retention.add(BASE, range(teacher.card.num_classes), context.evaluation)
        retention.measure(teacher.model, 0)
        current = teacher
        for number, task in enumerate(learning.course.tasks, 1):
            current = learning.learn(current, number)
            first = current.card.num_classes - len(task.class_names)
            retention.add(task.name, range(first, current.card.num_classes), task.test)
            retention.measure(current.model, number)
        retention.report(current.card.class_names)
        # What it was hashed as stands for the network within this run alone.
        card = dataclasses.replace(current.card, weights_sha256=None)
        return Outcome(dataclasses.replace(current, card=card))


class _Learning:
    """The sets being learnt, one after the other; what does not fit is refused before any work."""

    def __init__(
        self,
        options: Continual,
        teacher: Teacher,
        images: Images | Synthesis | None,
        context: RunContext,
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.context = context
        self.images = images
        card = teacher.card
        self.head = find_head(teacher.model, card.input_size, context.channel_rules)
        self.course = Course(options.sets, options.names, card, context.log)
        if images is None and options.replay is not None:
            raise DreamkitError("this application needs a synthesizer, or images that are there")
        if options.adaptive is not None:
            self._check_rhythm(options.adaptive)
        if isinstance(images, Synthesis):
            self.course.check_replay(images.synthesizer)
        elif images is not None:
            with placed("replay"):
                check_size(images, card)

    def _check_rhythm(self, adaptive: Adaptive) -> None:
        """Refuse a set whose training ends before all of its dreams are there."""
        if not isinstance(self.images, Synthesis):
            raise DreamkitError("it dreams, so leave 'images' out", ("adaptive",))
        for task, classes in zip(self.course.tasks, self.course.old_classes, strict=True):
            dreams = self.images.of(self.options.images_per_class * classes)
            batches = known_batches(dreams.synthesizer, self.teacher)
            if batches is None:  # left to the machine: looked at when it is known
                return
            check_rhythm(adaptive, batches, self.options.training.total_steps(len(task.train)))

    def learn(self, old: Teacher, number: int) -> Teacher:
        """Return the network that has learnt a set; the one it was before stays as it is.

        Args:
            old: the network as it is.
            number: of the set, from 1.
        """
        task, step = self.course.tasks[number - 1], self._step(number)
        origin = f"{self.teacher.card.name}, taught more classes without its data"
        new = with_classes(old, task.class_names, step.seed, origin, step.channel_rules)
        folder, metrics = step.folder / RunContext.STUDENT, step.log.metrics
        if (folder / SPECIFICATION).is_file():
            load_state(new.model, read_artifact(folder).state)
            new.model.eval()
            with contextlib.suppress(OSError, ValueError):  # what it took, and no more
                metrics |= json.loads((step.folder / METRICS).read_text(encoding="utf-8"))
            step.log.note(f"'{task.name}' is learnt already; going on")
        else:
            self._train(step, old, new, number)
            write_json(step.folder / METRICS, metrics)
            write_artifact(folder, new.model, new.card, new.builder, new.pruning_record)
            if distributed.is_first():
                shutil.rmtree(step.folder / RunContext.CHECKPOINTS, ignore_errors=True)
        total = self.context.log.metrics
        total |= {f"step{number}.{name}": value for name, value in metrics.items()}
        for name in SUMMED & metrics.keys():
            total[name] = total.get(name, 0) + metrics[name]
        # What is made from this network later is made from this one alone.
        card = dataclasses.replace(new.card, weights_sha256=hash_weights(new.model))
        return dataclasses.replace(new, card=card)

    def _step(self, number: int) -> RunContext:
        """Return where a step works: a folder and a seed of its own."""
        context = self.context
        return dataclasses.replace(
            context,
            seed=batch_seed(context.seed, number),
            folder=context.folder / STEPS / str(number),
            evaluation=self.course.known_images(number, context.evaluation),
            log=StepLog(context.log, f"step {number}: "),
        )

    def _train(self, step: RunContext, old: Teacher, new: Teacher, number: int) -> None:
        options, task = self.options.training, self.course.tasks[number - 1]
        trainer = IncrementalTrainer(
            self.options.losses,
            new.model,
            old.model,
            old.card,
            options,
            step.device,
            step.seed,
            options.total_steps(len(task.train)),
            step.log.note,
            head=self.head,
        )
        with self._old_images(step, old, new, number, trainer.total) as replay:
            sets = [task.train] if replay is None else [task.train, replay]
            with placed("training", always=False):
                taught_on = teach(trainer, sets, step, "training")
        if len(taught_on) > 1:
            how, size = self.options.refresh_bn, options.batch_size
            count, generator = self.options.images_per_class, stream(step.seed, "refresh")
            added = drawn_by_class(task.train, count, generator)
            refresh_statistics(how, old, new, taught_on[1], added, size, step)
        if isinstance(replay, AdaptivePool):
            report_synthesis(step, replay.dreams.store, old)

    @contextlib.contextmanager
    def _old_images(
        self, step: RunContext, old: Teacher, new: Teacher, number: int, steps: int
    ) -> Iterator[Images | AdaptivePool | None]:
        """Yield what stands for the images of old classes."""
        if self.images is None:
            yield None
            return
        if not isinstance(self.images, Synthesis):
            count = self.options.images_per_class
            yield self.course.real_images(self.images, number, count, step.seed)
            return
        count = self.options.images_per_class * old.card.num_classes
        synthesis = self.images.of(count)
        if self.options.adaptive is None:
            yield images_of(old, synthesis, step)
            return
        # Before it is compiled as a competitor.
        lay_out(new.model, self.options.training, step.device)
        rival = FirstOutputs(new.model, old.card.num_classes)
        with adaptive_pool(old, synthesis, step, rival, self.options.adaptive) as pool:
            pool.check(steps)
            pool.dream()
            yield pool
