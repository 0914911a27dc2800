"""Data-free continual learning: a network learns new classes and keeps the old ones, without data.

DeepInversion (Yin et al., CVPR 2020), section 4.5: old classes are dreamed from the network as it
is, and it is trained on these dreams and on images of the new classes (eq. 11).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.joined_images import JoinedImages
from dreamkit.model_state import load_state
from dreamkit.pruning.head import find_head, grow_head
from dreamkit.pruning.record import PruningRecord
from dreamkit.registry import EntryOf, RecordsOf, Term, TermsOf
from dreamkit.stages.adaptive import Adaptive, Growth, check_rhythm, growing
from dreamkit.stages.dreaming import (
    batch_seed,
    images_for,
    is_own_dreams,
    report_synthesis,
    student_folder,
)
from dreamkit.stages.measuring import measure_cost
from dreamkit.stages.retention import Retention
from dreamkit.stages.teaching import teach
from dreamkit.store.artifact import SPECIFICATION, read_artifact, write_artifact
from dreamkit.store.atomic import write_json
from dreamkit.store.source import Dreams
from dreamkit.teachers.weights import hash_weights
from dreamkit.training.batches import Shifted, drawn, drawn_by_class
from dreamkit.training.bn_recalibration import refresh
from dreamkit.training.incremental import FirstOutputs, IncrementalTrainer, IncrementalTraining
from dreamkit.training.losses.cross_entropy import CrossEntropy
from dreamkit.training.losses.old_distillation import OldDistillation
from dreamkit.training.losses.replay_distillation import ReplayDistillation
from dreamkit.training.trainer import lay_out
from dreamkit.types import (
    NO_LABEL,
    Images,
    ImageSource,
    IncrementalLoss,
    RunContext,
    RunLog,
    Teacher,
    needs,
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
class NewClasses:
    """Classes to be learnt together.

    Args:
        train: labelled images of them, and of no others.
        test: images to report accuracy on; null reports none of these classes.
        name: in reports; ``set1`` and so on by default.
        prefix: put before the names of the classes, where old ones are called the same and are
            others (an artichoke as a vegetable and as a flower).
    """

    train: Annotated[ImageSource, EntryOf("sources")]
    test: Annotated[ImageSource | None, EntryOf("sources")] = None
    name: str | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}", self.name):
            raise OptionError("name", "use letters, digits and '_-': metrics are called by it")


@dataclass(frozen=True)
class Continual:
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
        refresh_bn: after each set, let BatchNorm's statistics be those of what the network was
            taught on, old classes included, without changing what it computes: the next dreams are
            held to them.
    """

    sets: Annotated[tuple[NewClasses, ...], RecordsOf(NewClasses)]
    training: IncrementalTraining = field(default_factory=IncrementalTraining)
    losses: Annotated[tuple[Term[IncrementalLoss], ...], TermsOf("losses")] = EQUATION_11
    replay: Annotated[ImageSource | None, EntryOf("sources")] = field(default_factory=Dreams)
    images_per_class: Annotated[int, Field(ge=1)] = 250
    adaptive: Adaptive | None = None
    refresh_bn: bool = True

    def __post_init__(self) -> None:
        if not self.sets:
            raise OptionError("sets", "give at least one set of new classes")
        names = self.names
        if len({BASE, *names}) <= len(names):
            raise OptionError(
                "sets",
                f"two have one name, or one is called '{BASE}', as the teacher's classes are",
            )
        if not self.losses:
            raise OptionError("losses", "give at least one loss")
        looking = [term.name for term in self.losses if "replay" in needs(term.entry)]
        if looking and self.replay is None:
            raise OptionError(
                "replay",
                f"the loss '{looking[0]}' needs images of old classes, so it cannot be null",
            )
        if not looking and self.replay is not None:
            raise OptionError("replay", "no loss looks at images of old classes: set it to null")
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

    def make_student(self, context: RunContext) -> Teacher:
        """Return a copy of the teacher: what competes at first."""
        return dataclasses.replace(context.teacher, model=copy.deepcopy(context.teacher.model))

    def planned(self, context: RunContext) -> RunContext:
        """Return a context whose dreams cost what those of all steps do, to be estimated."""
        course = _Course(self, context)
        images = self.images_per_class * sum(course.old_classes)
        synthesizer: Any = context.synthesizer
        return dataclasses.replace(
            context,
            synthesizer=dataclasses.replace(synthesizer, images=images),
            folder=context.folder / STEPS / "1",
        )

    def run(self, context: RunContext) -> None:
        """Learn set after set; evaluate after each, and save."""
        teacher = context.teacher
        course = _Course(self, context)
        retention = Retention(context)
        retention.add(BASE, range(teacher.card.num_classes), context.evaluation)
        retention.measure(teacher.model, 0)
        current = teacher
        for number, task in enumerate(course.tasks, 1):
            current = course.learn(current, number)
            first = current.card.num_classes - len(task.class_names)
            retention.add(task.name, range(first, current.card.num_classes), task.test)
            retention.measure(current.model, number)
        retention.report(current.card.class_names)
        measure_cost(context, {"teacher": teacher.model, "student": current.model})
        _save(current, student_folder(context))


@dataclass(frozen=True)
class _Task:
    """A set that is opened: its images have their labels among all classes."""

    name: str
    class_names: tuple[str, ...]
    train: Images
    test: Images | None


class _Course:
    """The sets to be learnt, opened, and what stands for the images of the teacher's classes.

    Whatever does not fit is refused here, before any work is done.
    """

    def __init__(self, options: Continual, context: RunContext) -> None:
        self.options = options
        self.context = context
        card = context.teacher.card
        find_head(context.teacher.model, card.input_size)
        self.tasks = self._open()
        if options.adaptive is not None:
            self._check_rhythm(options.adaptive)
        self.replay: Images | None = None
        if options.replay is not None and not options.needs_synthesis:
            with placed("replay"):
                self.replay = options.replay.open(card)
                _check_size(self.replay, card)

    def _open(self) -> list[_Task]:
        card = self.context.teacher.card
        known = set(card.class_names or ())
        if not known:
            self.context.log.note(
                f"{card.name} does not name its classes: whether the new ones are among them is "
                "not checked"
            )
        tasks = []
        first = card.num_classes
        names = self.options.names
        for number, (name, added) in enumerate(zip(names, self.options.sets, strict=True)):
            with placed("sets", number):
                task = _opened(name, added, card, first)
                again = sorted(known & set(task.class_names))
                if again:
                    raise DreamkitError(
                        f"'{again[0]}' is an old class already: a set holds new classes only. If "
                        "it is another that is called the same, give the set a 'prefix'",
                        ("train",),
                    )
            known |= set(task.class_names)
            first += len(task.class_names)
            tasks.append(task)
        return tasks

    @property
    def old_classes(self) -> list[int]:
        """How many classes there are before each set."""
        sizes = [len(task.class_names) for task in self.tasks]
        return list(itertools.accumulate(sizes, initial=self.context.teacher.card.num_classes))[:-1]

    def _check_rhythm(self, adaptive: Adaptive) -> None:
        """Refuse a set whose training ends before all of its dreams are there."""
        synthesizer = self.context.synthesizer
        batch_size = getattr(synthesizer, "batch_size", None)
        if not isinstance(batch_size, int):  # left to the machine: looked at when it is known
            return
        for task, classes in zip(self.tasks, self.old_classes, strict=True):
            batches = math.ceil(self.options.images_per_class * classes / batch_size)
            check_rhythm(adaptive, batches, self.options.training.total_steps(len(task.train)))

    def learn(self, old: Teacher, number: int) -> Teacher:
        """Return the network that has learnt a set; the one it was before stays as it is.

        Args:
            old: the network as it is.
            number: of the set, from 1.
        """
        task = self.tasks[number - 1]
        classes = old.card.num_classes + len(task.class_names)
        step = self._step(old, number)
        pruning_record = PruningRecord.from_json(old.pruning_record)
        model = copy.deepcopy(old.model)
        grow_head(model, old.card.input_size, classes, step.seed, pruning_record)
        names = old.card.class_names
        card = dataclasses.replace(
            old.card,
            num_classes=classes,
            class_names=None if names is None else (*names, *task.class_names),
            origin=f"{self.context.teacher.card.name}, taught more classes without its data",
            weights_sha256=None,
            notes={},
        )
        new = Teacher(model, card, old.builder, pruning_record.to_json())
        folder = student_folder(step)
        if (folder / SPECIFICATION).is_file():
            load_state(model, read_artifact(folder).state)
            model.eval()
            with contextlib.suppress(OSError, ValueError):  # what it took, and no more
                step.metrics |= json.loads((step.folder / METRICS).read_text(encoding="utf-8"))
            step.log.note(f"'{task.name}' is learnt already; going on")
        else:
            self._train(step, new, number)
            write_json(step.folder / METRICS, step.metrics)
            _save(new, folder)
            if distributed.is_first():
                shutil.rmtree(step.folder / RunContext.CHECKPOINTS, ignore_errors=True)
        metrics = self.context.metrics
        metrics |= {f"step{number}.{name}": value for name, value in step.metrics.items()}
        for name in SUMMED & step.metrics.keys():
            metrics[name] = metrics.get(name, 0) + step.metrics[name]
        # What is made from this network later is made from this one alone.
        card = dataclasses.replace(card, weights_sha256=hash_weights(model))
        return dataclasses.replace(new, card=card)

    def _step(self, old: Teacher, number: int) -> RunContext:
        """Return what a step works with: the network as it is, and a folder of its own."""
        context = self.context
        synthesizer: Any = context.synthesizer
        if self.options.needs_synthesis:
            images = self.options.images_per_class * old.card.num_classes
            synthesizer = dataclasses.replace(synthesizer, images=images)
        return dataclasses.replace(
            context,
            seed=batch_seed(context.seed, number),
            folder=context.folder / STEPS / str(number),
            teacher=old,
            synthesizer=synthesizer,
            evaluation=self._known_images(number),
            log=_StepLog(context.log, f"step {number}: "),
            metrics={},
        )

    def _known_images(self, number: int) -> Images | None:
        """Return test images of every class that is known after a step; None if some lack."""
        parts = [self.context.evaluation, *(task.test for task in self.tasks[:number])]
        there = [part for part in parts if part is not None]
        return JoinedImages(there) if len(there) == len(parts) else None

    def _train(self, step: RunContext, new: Teacher, number: int) -> None:
        options, task = self.options.training, self.tasks[number - 1]
        trainer = IncrementalTrainer(
            self.options.losses,
            new.model,
            step.teacher.model,
            step.teacher.card,
            options,
            step.device,
            torch.Generator().manual_seed(step.seed + 1),
            options.total_steps(len(task.train)),
            step.log.note,
        )
        with self._old_images(step, new, number, trainer.total) as old:
            sets = [task.train] if old is None else [task.train, old]
            with placed("training", always=False):
                taught_on = teach(step, trainer, sets, "training")
        if self.options.refresh_bn and len(taught_on) > 1:
            # As many of each new class as of an old one.
            generator = torch.Generator().manual_seed(step.seed)
            added = drawn_by_class(task.train, self.options.images_per_class, generator)
            images = JoinedImages([added, *taught_on[1:]])
            refresh(new.model, images, new.card, step.device, options.batch_size)
        if isinstance(old, Growth):
            report_synthesis(step, old.dreams.store)

    @contextlib.contextmanager
    def _old_images(
        self, step: RunContext, new: Teacher, number: int, steps: int
    ) -> Iterator[Images | Growth | None]:
        """Yield what stands for the images of old classes."""
        if self.options.replay is None:
            yield None
        elif self.replay is not None:
            yield self._real_images(step, self.replay, number)
        elif self.options.adaptive is None:
            yield images_for(step, None)
        else:
            # Before it is compiled as a competitor.
            lay_out(new.model, self.options.training, step.device)
            rival = FirstOutputs(new.model, step.teacher.card.num_classes)
            with growing(step, rival, self.options.adaptive) as growth:
                growth.check(steps)
                growth.dream()
                yield growth

    def _real_images(self, step: RunContext, replay: Images, number: int) -> Images:
        """Return real images of the old classes, as many of each as there may be."""
        count, base = self.options.images_per_class, self.context.teacher.card
        generator = torch.Generator().manual_seed(step.seed)
        parts: list[Images] = [
            drawn(replay, count * base.num_classes, generator)
            if int(replay.batch([0])[1][0]) == NO_LABEL
            else drawn_by_class(replay, count, generator)
        ]
        earlier = self.tasks[: number - 1]
        parts += [drawn_by_class(task.train, count, generator) for task in earlier]
        return JoinedImages(parts)


def _save(taught: Teacher, folder: Path) -> None:
    write_artifact(folder, taught.model, taught.card, taught.builder, taught.pruning_record)


def _opened(name: str, added: NewClasses, card: Card, first: int) -> _Task:
    """Open a set whose first class is the output ``first``."""
    with placed("train"):
        names = _names_of(added.train)
        if names is None:
            raise DreamkitError(
                "its images have no classes of their own, which new classes need; use an image "
                "folder: {source: folder, path: ...}"
            )
        own = dataclasses.replace(
            card, name=f"the set '{name}'", num_classes=len(names), class_names=names
        )
        train = added.train.open(own)
        _check_size(train, card)
    test: Images | None = None
    if added.test is not None:
        with placed("test"):
            tested = _names_of(added.test)
            strange = [] if tested is None else sorted({*tested} - {*names})
            if strange:
                learnt = ", ".join(names[:20])
                raise DreamkitError(f"'{strange[0]}' is none of the classes learnt: {learnt}")
            test = Shifted(added.test.open(own), first)
            _check_size(test, card)
    called = tuple(added.prefix + class_name for class_name in names)
    return _Task(name, called, Shifted(train, first), test)


def _names_of(source: ImageSource) -> tuple[str, ...] | None:
    tell: Callable[[], tuple[str, ...] | None] | None = getattr(source, "class_names", None)
    return None if tell is None else tell()


def _check_size(images: Images, card: Card) -> None:
    if len(images) == 0:
        raise DreamkitError("it has no images")
    size = tuple(images.batch([0])[0].shape[1:])
    if size != card.input_size:
        raise DreamkitError(f"its images are {size}, {card.name} takes {card.input_size}")


class _StepLog:
    """A run's log, in which every stage of a step is called after it."""

    def __init__(self, log: RunLog, prefix: str) -> None:
        self.log = log
        self.prefix = prefix

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        self.log.record(self.prefix + stage, step, numbers)

    def begin(self, stage: str) -> None:
        self.log.begin(self.prefix + stage)

    def note(self, text: str) -> None:
        self.log.note(self.prefix + text)

    def check(self, together: bool = False) -> None:
        self.log.check(together)

    def progress(self, stage: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return self.log.progress(self.prefix + stage, total)
