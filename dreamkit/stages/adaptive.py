"""Adaptive DeepInversion: dreams that compete with a student in training.

Yin et al., CVPR 2020, section 3.4 (eq. 8 and 9) and, for its rhythm, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.stages.dreaming import Dreaming, dreaming
from dreamkit.stages.run_store import open_store
from dreamkit.stages.samples import Parts, held_back, some_of
from dreamkit.store.pool import Pool
from dreamkit.store.source import is_own_dreams
from dreamkit.types import (
    Application,
    BatchPlan,
    Images,
    ImageSource,
    RunContext,
    Synthesis,
    Teacher,
)


@dataclass(frozen=True)
class Adaptive:
    """When a student in training is given new dreams, until all of the synthesis's are there.

    One batch at a time is the paper's rhythm for CIFAR-10; many batches after many steps are
    rounds, its scheme for pruning: train, dream against that student, merge, go on.

    Args:
        every: training steps between; null spreads the dreams evenly over the first three
            quarters of the training.
        batches: how many batches of dreams each time, the first time before the first step. They
            are trained on at once, and then belong to the pool.
    """

    every: Annotated[int, Field(ge=1)] | None = 50
    batches: Annotated[int, Field(ge=1)] = 1

    def rhythm(self, batches: int, steps: int) -> int:
        """Return the training steps between dreams.

        Args:
            batches: of dreams in all.
            steps: of the training.
        """
        if self.every is not None:
            return self.every
        return max(1, 3 * steps // (4 * math.ceil(batches / self.batches)))


class TrainsOnImages(Application):
    """What applications have in common that train on images, or on dreams of their own.

    They are dataclasses with the fields ``images`` and ``adaptive``.
    """

    images: ImageSource | None
    adaptive: Adaptive | None

    def check_adaptive(self) -> None:
        """Refuse to dream against a student where images are given.

        Raises:
            OptionError: it was asked for.
        """
        if self.adaptive is not None and not self.needs_synthesis:
            raise OptionError("adaptive", "it dreams, so leave 'images' out")

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images)

    @property
    def trains_student(self) -> bool:
        """Whether dreams are made against the student in training."""
        return self.adaptive is not None


class AdaptivePool:
    """The images of a student in training, and what is to be dreamed for it when.

    Args:
        options: the rhythm.
        dreams: at work against the student.
        compared: whether a part is held back, to compare the student with its teacher on.
    """

    def __init__(self, options: Adaptive, dreams: Dreaming, compared: bool = False) -> None:
        self.options = options
        self.dreams = dreams
        self.pool = Pool()
        self.compared = Pool()
        """The dreams so far that are held back."""
        self.held = torch.zeros(0, dtype=torch.int64)
        """Positions of these among all dreams that there are to be."""
        if compared:
            self.held = held_back(self.planned, dreams.context.seed)
        self.every = options.every or 1
        self.batches = 0
        """How many batches of the plan are in the pool, or were left out for good."""

    def check(self, steps: int, place: str = "training") -> None:
        """Refuse a training that would end before all dreams are there, and settle the rhythm.

        Args:
            steps: of the training.
            place: where its options stand in the application.

        Raises:
            DreamkitError: naming how many steps it takes.
        """
        check_rhythm(self.options, len(self.dreams.plans), steps, place)
        self.every = self.options.rhythm(len(self.dreams.plans), steps)

    @property
    def images(self) -> int:
        """How many images the pool is to hold in the end."""
        return self.planned - len(self.held)

    @property
    def planned(self) -> int:
        """How many dreams there are to be, those that are held back among them."""
        return sum(plan.size for plan in self.dreams.plans)

    @property
    def parts(self) -> Parts:
        """The dreams so far."""
        if len(self.held):
            return Parts(self.pool, self.compared, apart=True)
        return Parts(self.pool, some_of(self.pool, self.dreams.context.seed), apart=False)

    def due(self, step: int) -> bool:
        """Return whether new dreams are to come before this training step (from 0)."""
        wanted = self.options.batches * (1 + step // self.every)
        return self.batches < min(wanted, len(self.dreams.plans))

    def dream(self) -> int:
        """Merge as many batches as come at once, from the store or new; return their images."""
        before = len(self.pool)
        if self.options.batches > 1:
            self.dreams.context.log.note(
                f"dreaming {self.options.batches} batches against the student as it is"
            )
        until = min(self.batches + self.options.batches, len(self.dreams.plans))
        store = self.dreams.store
        coming = self.dreams.plans[self.batches : until]
        done = {*store.shards, *store.skipped}
        lacking = [plan for plan in coming if plan.index not in done]
        steps = self.dreams.synthesizer.steps_per_batch
        places = {plan.index: i for i, plan in enumerate(lacking)}
        log = self.dreams.context.log
        with log.progress("dreams against the student", steps * len(lacking)) as advance:

            def on_step(plan: BatchPlan, done: int) -> None:
                advance(places[plan.index] * steps + done)
                log.check()

            self.dreams.batches(lacking, on_step)
        while self.batches < until:
            self._merge()
        if len(self.pool) == 0:
            reason = store.skipped[coming[0].index].reason
            store.withdraw()
            raise DreamkitError(f"the first dreams came to nothing: {reason}")
        return len(self.pool) - before

    def restore(self, batches: int) -> None:
        """Fill the pool with the first batches of the plan, all of them from the store.

        Raises:
            DreamkitError: one is gone.
        """
        store = self.dreams.store
        gone = [i for i in range(batches) if i not in store.shards and i not in store.skipped]
        if gone:
            raise DreamkitError(
                f"batch {gone[0]} of {store.folder} is gone, and the student that it was dreamed "
                "against with it; remove the run's folder 'checkpoints' to train from the start"
            )
        while self.batches < batches:
            self._merge()

    def _merge(self) -> None:
        plan, store = self.dreams.plans[self.batches], self.dreams.store
        if plan.index in store.shards:
            content = store.read(plan.index)
            first = sum(earlier.size for earlier in self.dreams.plans[: self.batches])
            held = torch.isin(first + torch.arange(len(content)), self.held)
            for pool, mine in ((self.pool, ~held), (self.compared, held)):
                if mine.any():
                    pool.add(content.chosen(mine))
        self.batches += 1


def check_rhythm(options: Adaptive, batches: int, steps: int, place: str = "training") -> None:
    """Refuse a training that would end before all dreams are there.

    Args:
        options: the rhythm.
        batches: of dreams in all.
        steps: of the training.
        place: where its options stand in the application.

    Raises:
        DreamkitError: naming how many steps it takes.
    """
    events = math.ceil(batches / options.batches)
    last = options.rhythm(batches, steps) * (events - 1)
    if last >= steps:
        raise DreamkitError(
            f"the last of {batches} batches of dreams would come before step {last + 1}, and the "
            f"training has {steps}: give it 'steps: {last + 1}' or more, lower 'adaptive.every', "
            "raise 'adaptive.batches', or dream fewer images",
            (place,),
        )


@contextmanager
def adaptive_pool(
    teacher: Teacher,
    images: Images | Synthesis | None,
    context: RunContext,
    student: nn.Module,
    options: Adaptive,
    compared: bool = False,
) -> Iterator[AdaptivePool]:
    """Set a synthesizer to work against a student in training.

    Args:
        teacher: that is inverted.
        images: how they are dreamed.
        context: the run's.
        student: that the dreams are made against.
        options: the rhythm.
        compared: whether a part is held back to compare the student with its teacher.

    Raises:
        DreamkitError: images are given, and not how to dream them.
    """
    if not isinstance(images, Synthesis):
        raise DreamkitError("it dreams, so leave 'images' out", ("adaptive",))
    store = open_store(teacher, images, context)
    with dreaming(teacher, images, context, store, student) as dreams:
        yield AdaptivePool(options, dreams, compared)
