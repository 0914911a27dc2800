"""Dreaming within a run: batch by batch into its store, going on where an earlier try ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.errors import DreamkitError, NonFiniteLoss
from dreamkit.out_of_memory import enough_memory
from dreamkit.stages.batches import as_stored, doubts_of, plans_of
from dreamkit.stages.progress_picture import ProgressPicture
from dreamkit.stages.rank_records import RankRecords
from dreamkit.stages.run_store import find_batches, open_store, report_synthesis, run_store
from dreamkit.stages.statistics_distance import overall
from dreamkit.store.dreams import DreamStore
from dreamkit.store.shard import ShardedImages
from dreamkit.types import (
    BatchDreamed,
    BatchPlan,
    Dreamer,
    Estimate,
    Images,
    RunContext,
    StoredImages,
    Synthesis,
    Teacher,
    Watchable,
)
from dreamkit.wording import duration

_CURVE_POINTS = 40


def images_of(teacher: Teacher, images: Images | Synthesis | None, context: RunContext) -> Images:
    """Return the images that an application works on, dreaming those that are not there yet.

    Raises:
        DreamkitError: there are none.
    """
    if images is None:
        raise DreamkitError("this application needs a synthesizer, or images that are there")
    if isinstance(images, Synthesis):
        return dream_into_store(teacher, images, context)
    if len(images) == 0:
        raise DreamkitError("the source of training images is empty", ("images",))
    return images


def dream_into_store(teacher: Teacher, synthesis: Synthesis, context: RunContext) -> ShardedImages:
    """Dream every batch that the run's store does not hold yet, and report on all of them.

    Raises:
        DreamkitError: no batch came to anything.
    """
    store = open_store(teacher, synthesis, context)
    if store.lacks(synthesis.synthesizer.images):
        steps = synthesis.synthesizer.steps_per_batch
        with dreaming(teacher, synthesis, context, store) as work:
            missing = work.missing()
            with context.log.progress("synthesis", len(missing) * steps) as advance:
                places = {plan.index: place for place, plan in enumerate(missing)}

                def on_step(plan: BatchPlan, done: int) -> None:
                    advance(places[plan.index] * steps + done)  # other ranks' may be between
                    context.log.check()

                work.batches(missing, on_step)
    if len(store) == 0:
        reasons = [batch.reason for _, batch in sorted(store.skipped.items())]
        store.withdraw()
        raise DreamkitError(f"no batch of dreams came to anything; the first: {reasons[0]}")
    report_synthesis(context, store, teacher)
    return store.open()


def estimate_synthesis(
    teacher: Teacher, synthesis: Synthesis, context: RunContext, student: nn.Module | None = None
) -> Estimate | None:
    """Return what dreaming takes that is not done yet, from a few timed steps.

    Nothing is written. None where nothing is left to dream.

    Args:
        teacher: to be inverted.
        synthesis: what is to be dreamed.
        context: the run's.
        student: what the teacher is to compete with, if that is trained meanwhile.
    """
    store = run_store(teacher, synthesis, context)
    if not store.lacks(synthesis.synthesizer.images):
        return None
    with ExitStack() as stack:
        dreamer = _at_work(teacher, synthesis, context, store.choices, student, stack)
        work = Dreaming(teacher, synthesis, context, store, dreamer, shared=student is None)
        return work.estimate()


def _at_work(
    teacher: Teacher,
    synthesis: Synthesis,
    context: RunContext,
    choices: Mapping[str, Any],
    student: nn.Module | None,
    stack: ExitStack,
) -> Dreamer:
    """Return a synthesizer bound to a teacher until the stack is left."""
    begin, note, seed = synthesis.synthesizer.session, context.log.note, context.seed
    with context.log.progress("preparing", 1):  # it may try batch sizes
        return stack.enter_context(
            begin(teacher, context.device, choices, note, student, seed=seed)
        )


class Dreaming:
    """A run's dreaming under way: a synthesizer at work, and the store that it fills.

    Args:
        teacher: that is inverted.
        synthesis: what is dreamed.
        context: the run's.
        store: where batches go.
        dreamer: makes them.
        shared: whether ranks share all batches out, and not only those that come at once against
            a student in training.
    """

    def __init__(
        self,
        teacher: Teacher,
        synthesis: Synthesis,
        context: RunContext,
        store: DreamStore,
        dreamer: Dreamer,
        shared: bool = True,
    ) -> None:
        self.teacher = teacher
        self.synthesizer = synthesis.synthesizer
        self.shared = shared
        self.context = context
        self.store = store
        self.dreamer = dreamer
        self.records = RankRecords(context.log)
        self.picture = ProgressPicture(store, teacher.card, context.log)
        self.plans = plans_of(dreamer, self.synthesizer.images, context.seed)

    def missing(self) -> list[BatchPlan]:
        """Return the batches that the store lacks."""
        done = {*self.store.shards, *self.store.skipped}
        return [plan for plan in self.plans if plan.index not in done]

    def estimate(self) -> Estimate:
        """Prepare for the batches that are missing, and tell what they will take."""
        context, missing = self.context, self.missing()
        if len(missing) < len(self.plans):
            kept = len(self.plans) - len(missing)
            context.log.note(f"resuming: {kept} of {len(self.plans)} batches kept")
        images = sum(plan.size for plan in missing)
        ranks = distributed.size() if self.shared and not self.dreamer.state() else 1
        mine = missing[: math.ceil(len(missing) / ranks)]
        start = time.perf_counter()
        with context.log.progress("preparing", 1), self._enough_memory():
            for doubt in doubts_of(self.synthesizer, self.dreamer, self.teacher):
                context.log.note(doubt)
            cost = self.dreamer.prepare(sum(plan.size for plan in mine))
        context.log.metrics |= {
            "synthesis.preparation_seconds": time.perf_counter() - start,
            "synthesis.estimated_seconds": cost.seconds,
            "synthesis.estimated_memory_bytes": float(cost.memory_bytes),
        }
        batches = f"{len(missing)} batches" if len(missing) > 1 else "1 batch"
        batches += f" on {ranks} ranks" if ranks > 1 else ""
        context.log.note(
            f"dreaming {images} images in {batches}: about {duration(cost.seconds)}, "
            f"{cost.memory_bytes / 2**30:.1f} GB on this {context.device.type.upper()}"
        )
        return cost

    def batches(
        self, plans: Sequence[BatchPlan], on_step: Callable[[BatchPlan, int], None]
    ) -> None:
        """Dream batches into the store, each by the rank that comes to it first.

        Args:
            plans: the same on every rank.
            on_step: told the batch, and how many of its steps are done.
        """
        if not plans:
            return
        if self.dreamer.state():  # each batch builds on the one before
            drawn: Iterable[BatchPlan] = plans if distributed.is_first() else ()
        else:
            name = f"{self.store.folder} {plans[0].index} {len(plans)}"
            drawn = distributed.drawn_from(plans, name)
        for plan in drawn:
            self._batch(plan, partial(on_step, plan))
            on_step(plan, self.synthesizer.steps_per_batch)  # it may have stopped early
        if distributed.size() > 1:
            mine, mine_skipped = set(self.store.shards), set(self.store.skipped)
            distributed.barrier()
            find_batches(self.store, [plan.index for plan in plans])
            for index in sorted(self.store.shards.keys() - mine if distributed.is_first() else ()):
                self._tell(index, self.store.read(index))  # listeners are on the first rank alone
            for index in sorted(self.store.skipped.keys() - mine_skipped):
                reason = self.store.skipped[index].reason
                self.context.log.note(f"batch {index} is left out: {reason}")
            self.records.gather()
        self.picture.catch_up()

    def _batch(self, plan: BatchPlan, advance: Callable[[int], None]) -> None:
        """Dream one batch into the store, or note that it came to nothing."""
        log, index, steps = self.context.log, plan.index, self.synthesizer.steps_per_batch
        every = max(1, steps // _CURVE_POINTS)

        def on_step(done: int, terms: Mapping[str, Tensor]) -> None:
            advance(done)
            if done % every == 0 or done == steps:
                values = {name: float(value) for name, value in terms.items()}
                self.records.record("synthesis", index * steps + done, values)

        start = time.perf_counter()
        try:
            with self._enough_memory():
                dream = self.dreamer.dream(plan, on_step)
        except NonFiniteLoss as error:
            log.note(f"batch {index} is left out: {error.message}")
            self.store.skip(index, plan.size, error.message)
            return
        with self._enough_memory():
            content, quality = as_stored(dream, self.teacher)
        distances = quality.statistics_distance
        seconds = time.perf_counter() - start
        state = self.dreamer.state()
        self.store.write(index, content, seconds, dream.loss, distances, state)
        self._tell(index, content)
        if (mean := overall(distances)) is not None:
            self.records.record("batches", index, {"statistics_distance": mean})
            self.records.record("statistics distance by layer", index, dict(distances))

    def _enough_memory(self) -> AbstractContextManager[None]:
        cure = f"lower the synthesis's batch_size ({self.dreamer.batch_size} now)"
        return enough_memory("dreaming", f"{cure}; batches that are finished are kept")

    def _tell(self, index: int, content: StoredImages) -> None:
        loss = self.store.shards[index].loss
        assert loss is not None  # every shard has one
        event = BatchDreamed(index=index, images=content.images, labels=content.labels, loss=loss)
        self.context.log.emit(event)
        self.picture.add(index, content)


@contextmanager
def dreaming(
    teacher: Teacher,
    synthesis: Synthesis,
    context: RunContext,
    store: DreamStore,
    student: nn.Module | None = None,
) -> Iterator[Dreaming]:
    """Set a synthesizer to work on what a run's store lacks.

    Args:
        teacher: to be inverted.
        synthesis: what is to be dreamed.
        context: the run's.
        store: from ``open_store``.
        student: in training, for the teacher to compete with.
    """
    log = context.log
    # What is left to the machine is resolved by the first rank, for the rest to do likewise.
    resolved = store.choices if distributed.is_first() else distributed.broadcast(store.choices)
    with ExitStack() as stack:
        dreamer = _at_work(teacher, synthesis, context, resolved, student, stack)
        work = Dreaming(teacher, synthesis, context, store, dreamer, shared=student is None)
        if work.missing():
            work.estimate()
        if distributed.is_first():
            distributed.broadcast(dict(dreamer.choices))
        state = store.read_state() if distributed.is_first() else {}  # it alone builds on it
        if state:
            dreamer.restore(state)
        work.picture.begin()
        if isinstance(dreamer, Watchable):
            dreamer.watch(work.picture.see)
        if not store.choices:
            store.choices = dict(resolved or dreamer.choices)
        elif store.choices != dreamer.choices:
            log.note(
                f"the dreams that are kept were made with {store.choices}, and the rest are made "
                f"with {dict(dreamer.choices)}: an undisturbed run's would differ a little"
            )
        yield work
