"""The course of classes: the sets that a network is to learn, opened and checked."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.joined_images import JoinedImages, lacks_labels
from dreamkit.pruning.head import grow_head
from dreamkit.pruning.record import PruningRecord
from dreamkit.registry import EntryOf
from dreamkit.seeds import stream
from dreamkit.stages.opening import opened
from dreamkit.stages.teaching import trainable_copy
from dreamkit.training.batches import Shifted, drawn, drawn_by_class
from dreamkit.types import (
    ChannelRule,
    Event,
    Images,
    ImageSource,
    Labelled,
    RunLog,
    Synthesizer,
    Teacher,
)
from dreamkit.wording import and_more


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
class Task:
    """A set that is opened: its images have their labels among all classes."""

    name: str
    class_names: tuple[str, ...]
    train: Images
    test: Images | None


class Course:
    """The sets to be learnt after a teacher's own classes.

    Whatever does not fit is refused here, before any work is done.

    Args:
        sets: in the order in which they come.
        names: of the sets.
        card: the teacher's.
        log: told what cannot be checked.

    Raises:
        DreamkitError: a set's images do not fit, or its classes are known already.
    """

    def __init__(
        self, sets: Sequence[NewClasses], names: Sequence[str], card: Card, log: RunLog
    ) -> None:
        self.base = card.num_classes
        self.tasks: list[Task] = []
        known = set(card.class_names or ())
        if not known:
            log.note(
                f"{card.name} does not name its classes: whether the new ones are among them is "
                "not checked"
            )
        first = card.num_classes
        for number, (name, added) in enumerate(zip(names, sets, strict=True)):
            with placed("sets", number):
                task = _opened(name, added, card, first, log)
                again = sorted(known & set(task.class_names))
                if again:
                    raise DreamkitError(
                        f"'{again[0]}' is an old class already: a set holds new classes only. If "
                        "it is another that is called the same, give the set a 'prefix'",
                        ("train",),
                    )
            known |= set(task.class_names)
            first += len(task.class_names)
            self.tasks.append(task)

    @property
    def old_classes(self) -> list[int]:
        """How many classes there are before each set."""
        sizes = [len(task.class_names) for task in self.tasks]
        return list(itertools.accumulate(sizes, initial=self.base))[:-1]

    def check_replay(self, synthesizer: Synthesizer) -> None:
        """Refuse dreams of some of the old classes alone, as a synthesizer's list of labels asks.

        Raises:
            DreamkitError: naming the first class that would not be dreamed.
        """
        listed: set[int] = set()
        for member in synthesizer.members:
            labels = getattr(member, "labels", "balanced")
            if isinstance(labels, str):
                return
            listed |= set(labels)
        for task, classes in zip(self.tasks, self.old_classes, strict=True):
            lacking = sorted({*range(classes)} - listed)
            if lacking:
                raise DreamkitError(
                    f"the synthesizer's 'labels' leave out class {lacking[0]}, which is old when "
                    f"'{task.name}' is learnt and would be forgotten: leave them at 'balanced'"
                )

    def known_images(self, number: int, evaluation: Images | None) -> Images | None:
        """Return test images of every class that is known after a set; None if some lack.

        Args:
            number: of the set, from 1.
            evaluation: test images of the teacher's own classes.
        """
        parts = [evaluation, *(task.test for task in self.tasks[:number])]
        there = [part for part in parts if part is not None]
        return JoinedImages(there) if len(there) == len(parts) else None

    def real_images(self, replay: Images, number: int, count: int, seed: int) -> Images:
        """Return real images of the classes before a set, as many of each as there may be.

        Args:
            replay: of the teacher's own classes.
            number: of the set, from 1.
            count: how many there may be of a class.
            seed: of what is drawn.
        """
        generator = stream(seed, "replay")
        parts: list[Images] = [
            drawn(replay, count * self.base, generator)
            if lacks_labels(replay)
            else drawn_by_class(replay, count, generator)
        ]
        earlier = self.tasks[: number - 1]
        parts += [drawn_by_class(task.train, count, generator) for task in earlier]
        return JoinedImages(parts)


def with_classes(
    old: Teacher,
    class_names: Sequence[str],
    seed: int,
    origin: str,
    rules: Sequence[ChannelRule] = (),
) -> Teacher:
    """Return a copy of a network that has outputs for more classes too.

    Args:
        old: stays as it is.
        class_names: of the classes that are added.
        seed: of the new outputs' weights.
        origin: of the copy, for its card.
        rules: by which its last layer is found, beside those that are known.
    """
    classes = old.card.num_classes + len(class_names)
    pruning_record = PruningRecord.from_json(old.pruning_record)
    model = trainable_copy(old.model)
    grow_head(model, old.card.input_size, classes, seed, pruning_record, rules)
    names = old.card.class_names
    card = dataclasses.replace(
        old.card,
        num_classes=classes,
        class_names=None if names is None else (*names, *class_names),
        origin=origin,
        weights_sha256=None,
        notes={},
    )
    return Teacher(model, card, old.builder, pruning_record.to_json())


def _opened(name: str, added: NewClasses, card: Card, first: int, log: RunLog) -> Task:
    """Open a set whose first class is the output ``first``."""
    with placed("train"):
        names = added.train.class_names()
        if names is None:
            raise DreamkitError(
                "its images have no classes of their own, which new classes need; use an image "
                "folder: {source: folder, path: ...}"
            )
        own = dataclasses.replace(
            card, name=f"the set '{name}'", num_classes=len(names), class_names=names
        )
        train = opened(added.train, own, log.note)
        check_size(train, card)
        _check_classes(train, names)
    test: Images | None = None
    if added.test is not None:
        with placed("test"):
            tested = added.test.class_names()
            strange = [] if tested is None else sorted({*tested} - {*names})
            if strange:
                learnt = ", ".join(names[:20])
                raise DreamkitError(f"'{strange[0]}' is none of the classes learnt: {learnt}")
            test = Shifted(opened(added.test, own, log.note), first)
            check_size(test, card)
    called = tuple(added.prefix + class_name for class_name in names)
    return Task(name, called, Shifted(train, first), test)


def _check_classes(images: Images, names: Sequence[str]) -> None:
    """Refuse classes to be learnt of which there is no image, where images tell their classes."""
    there = set(images.labels.tolist()) if isinstance(images, Labelled) else set(range(len(names)))
    lacking = [f"'{name}'" for number, name in enumerate(names) if number not in there]
    if lacking:
        raise DreamkitError(
            f"there is no image of {and_more(lacking)}, and no class is learnt without: take it out"
        )


def check_size(images: Images, card: Card) -> None:
    """Refuse images that are none, or not of a card's size.

    Raises:
        DreamkitError: saying what they are.
    """
    if len(images) == 0:
        raise DreamkitError("it has no images")
    size = tuple(images.batch([0])[0].shape[1:])
    if size != card.input_size:
        raise DreamkitError(f"its images are {size}, {card.name} takes {card.input_size}")


class StepLog:
    """A run's log, in which every stage of a step is called after it.

    Its metrics are the step's own.

    Args:
        log: the run's.
        prefix: put before every stage and note.
    """

    def __init__(self, log: RunLog, prefix: str) -> None:
        self.log = log
        self.prefix = prefix
        self.metrics: dict[str, float] = {}
        self.details = log.details
        self.failures = log.failures

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Add one point to the curves of a stage of this step."""
        self.log.record(self.prefix + stage, step, numbers)

    def begin(self, stage: str) -> None:
        """Forget what an interrupted try recorded under a stage of this step."""
        self.log.begin(self.prefix + stage)

    def note(self, text: str) -> None:
        """Say something the user must know, and of which step."""
        self.log.note(self.prefix + text)

    def emit(self, event: Event) -> None:
        """Tell those who listen what happened."""
        self.log.emit(event)

    def check(self, together: bool = False) -> None:
        """Raise KeyboardInterrupt if the run is to stop."""
        self.log.check(together)

    def progress(
        self, stage: str, total: int, before: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show progress of a stage of this step."""
        return self.log.progress(self.prefix + stage, total, before)
