"""From a source in a recipe to images: dreamed first where the source is the run's own."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.errors import DreamkitError, NonFiniteLoss, placed
from dreamkit.model_state import eval_mode
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.store.dreams import DreamStore
from dreamkit.store.shard import ShardedImages
from dreamkit.store.source import Dreams
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.types import (
    BatchPlan,
    Dream,
    Dreamer,
    Estimate,
    Images,
    ImageSource,
    InversionStep,
    RunContext,
    StoredImages,
    Teacher,
)

_CURVE_POINTS = 40


def is_own_dreams(source: ImageSource | None) -> bool:
    """Whether a source is the dreams that the run itself makes."""
    return source is None or (isinstance(source, Dreams) and source.path is None)


def images_for(context: RunContext, source: ImageSource | None) -> Images:
    """Return the images an application trains on, dreaming them first if they are its own.

    Raises:
        DreamkitError: the source is empty.
    """
    if is_own_dreams(source):
        images: Images = dream_into_store(context)
    else:
        assert source is not None
        with placed("images"):
            images = source.open(context.teacher.card)
    if len(images) == 0:
        raise DreamkitError("the source of training images is empty", ("images",))
    return images


def dream_into_store(context: RunContext) -> ShardedImages:
    """Dream every batch that the run's store does not hold yet, and report on all of them.

    Raises:
        DreamkitError: the recipe has no ``synthesis``.
    """
    store = open_store(context)
    assert context.synthesizer is not None
    if store.lacks(context.synthesizer.images):
        steps = context.synthesizer.steps_per_batch
        with dreaming(context, store) as work:
            missing = work.missing()
            with context.log.progress("synthesis", len(missing) * steps) as advance:
                places = {plan.index: place for place, plan in enumerate(missing)}

                def on_step(plan: BatchPlan, done: int) -> None:
                    advance(places[plan.index] * steps + done)  # other ranks' may be between
                    context.log.check()

                work.batches(missing, on_step)
    if len(store) == 0:
        store.withdraw()
        raise DreamkitError("no batch of dreams came to anything; see the notes above")
    report_synthesis(context, store)
    return store.open()


def report_synthesis(context: RunContext, store: DreamStore) -> None:
    """Add the metrics of a run's dreams."""
    context.metrics["synthesis.images"] = len(store)
    context.metrics["synthesis.skipped_batches"] = len(store.skipped)
    context.metrics["synthesis.seconds"] = store.seconds
    rate = len(store) / store.seconds * distributed.size()
    context.metrics["synthesis.images_per_second"] = rate
    if store.r_feature is not None:
        context.metrics["synthesis.r_feature"] = store.r_feature
    content = store.open()
    right = content.teacher_logits.argmax(1) == content.labels
    context.metrics["synthesis.teacher_accuracy"] = float(right.float().mean())


def open_store(context: RunContext) -> DreamStore:
    """Return the run's store, and tell what it left out.

    Raises:
        DreamkitError: the recipe has no ``synthesis``.
    """
    if context.synthesizer is None:
        raise DreamkitError("this application dreams, so the recipe needs 'synthesis'")
    with distributed.first_before_others():
        store = _store(context)
        if distributed.is_first():
            store.mend()
    distributed.barrier()  # before the first rank adds what the rest might find there
    for note in store.notes:
        context.log.note(note)
    for batch in store.skipped.values():
        note = f"batch {batch.index} was left out ({batch.reason})"
        if store.state is None:  # else later ones build on its absence
            note += f"; to try it again, remove {store.folder / batch.file}"
        context.log.note(note)
    return store


def _store(context: RunContext) -> DreamStore:
    return DreamStore(
        context.folder / RunContext.DREAMS,
        {
            "seed": context.seed,
            "teacher_sha256": context.teacher.card.weights_sha256,
            "synthesis": context.recipe["synthesis"],
        },
    )


def estimate_synthesis(context: RunContext, student: nn.Module | None = None) -> Estimate | None:
    """Return what dreaming takes that is not done yet, from a few timed steps.

    Nothing is written. None where nothing is left to dream.

    Args:
        context: the run's.
        student: what the teacher is to compete with, if that is trained meanwhile.
    """
    synthesizer = context.synthesizer
    if synthesizer is None:
        return None
    store = _store(context)
    if not store.lacks(synthesizer.images):
        return None
    with synthesizer.session(
        context.teacher, context.device, store.choices, context.log.note, student
    ) as dreamer:
        return Dreaming(context, store, dreamer, shared=student is None).estimate()


class Dreaming:
    """A run's dreaming under way: a synthesizer at work, and the store that it fills.

    Args:
        context: the run's.
        store: where batches go.
        dreamer: makes them.
        shared: whether ranks share all batches out, and not only those that come at once against
            a student in training.
    """

    def __init__(
        self, context: RunContext, store: DreamStore, dreamer: Dreamer, shared: bool = True
    ) -> None:
        assert context.synthesizer is not None
        self.shared = shared
        self.context = context
        self.store = store
        self.dreamer = dreamer
        self.records: list[tuple[str, int, dict[str, float]]] = []
        """What this rank has yet to tell the first, which writes the log."""
        self.plans = batch_plans(context.synthesizer.images, dreamer.batch_size, context.seed)

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
        cost = self.dreamer.prepare(sum(plan.size for plan in mine))
        context.metrics["synthesis.preparation_seconds"] = time.perf_counter() - start
        context.metrics["synthesis.estimated_seconds"] = cost.seconds
        context.metrics["synthesis.estimated_memory_bytes"] = float(cost.memory_bytes)
        batches = f"{len(missing)} batches" if len(missing) > 1 else "1 batch"
        batches += f" on {ranks} ranks" if ranks > 1 else ""
        context.log.note(
            f"dreaming {images} images in {batches}: about {format_duration(cost.seconds)}, "
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
            mine: Iterable[BatchPlan] = plans if distributed.is_first() else ()
        else:
            name = f"{self.store.folder} {plans[0].index} {len(plans)}"
            mine = distributed.drawn_from(plans, name)
        for plan in mine:
            self._batch(plan, partial(on_step, plan))
            on_step(plan, self.steps)  # it may have stopped early
        if distributed.size() > 1:
            mine_skipped = set(self.store.skipped)
            distributed.barrier()
            self.store.refresh(plan.index for plan in plans)
            for index in sorted(self.store.skipped.keys() - mine_skipped):
                reason = self.store.skipped[index].reason
                self.context.log.note(f"batch {index} is left out: {reason}")
            for records in distributed.gather(self.records):
                for stage, step, numbers in records:
                    self.context.log.record(stage, step, numbers)
            self.records = []

    @property
    def steps(self) -> int:
        """How many steps a batch has."""
        assert self.context.synthesizer is not None
        return self.context.synthesizer.steps_per_batch

    def _batch(self, plan: BatchPlan, advance: Callable[[int], None]) -> None:
        """Dream one batch into the store, or note that it came to nothing."""
        log, index, steps = self.context.log, plan.index, self.steps
        every = max(1, steps // _CURVE_POINTS)

        def on_step(done: int, terms: Mapping[str, Tensor]) -> None:
            advance(done)
            if done % every == 0 or done == steps:
                values = {name: float(value) for name, value in terms.items()}
                self._record("synthesis", index * steps + done, values)

        start = time.perf_counter()
        try:
            dream = self.dreamer.dream(plan, on_step)
        except NonFiniteLoss as error:
            log.note(f"batch {index} is left out: {error.message}")
            self.store.skip(index, plan.size, error.message)
            return
        content, per_layer = judge(dream, self.context.teacher)
        r_feature = sum(per_layer.values()) if per_layer else None
        seconds = time.perf_counter() - start
        state = self.dreamer.state()
        self.store.write(index, content, seconds, dream.loss, r_feature, state)
        if r_feature is not None:
            self._record("batches", index, {"r_feature": r_feature})
            self._record("r_feature by layer", index, per_layer)

    def _record(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        if distributed.is_first():
            self.context.log.record(stage, step, numbers)
        else:
            self.records.append((stage, step, numbers))


@contextmanager
def dreaming(
    context: RunContext, store: DreamStore, student: nn.Module | None = None
) -> Iterator[Dreaming]:
    """Set a synthesizer to work on what a run's store lacks.

    Args:
        context: the run's.
        store: from ``open_store``.
        student: in training, for the teacher to compete with.
    """
    log, synthesizer = context.log, context.synthesizer
    assert synthesizer is not None
    # What is left to the machine is resolved by the first rank, for the rest to do likewise.
    resolved = store.choices if distributed.is_first() else distributed.broadcast(store.choices)
    with synthesizer.session(
        context.teacher, context.device, resolved, log.note, student
    ) as dreamer:
        work = Dreaming(context, store, dreamer, shared=student is None)
        if work.missing():
            work.estimate()
        if distributed.is_first():
            distributed.broadcast(dict(dreamer.choices))
        state = store.read_state() if distributed.is_first() else {}  # it alone builds on it
        if state:
            dreamer.restore(state)
        if not store.choices:
            store.choices = dict(resolved or dreamer.choices)
        elif store.choices != dreamer.choices:
            log.note(
                f"the dreams that are kept were made with {store.choices}, and the rest are made "
                f"with {dict(dreamer.choices)}: an undisturbed run's would differ a little"
            )
        yield work


def format_duration(seconds: float) -> str:
    """Write a time the way people say it: ``40 s``, ``12 min``, ``3 h 10 min``, ``2 d 4 h``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def batch_plans(images: int, batch_size: int, seed: int) -> list[BatchPlan]:
    """Divide images into batches, each with a seed from the recipe's and its index alone."""
    plans = []
    for index, first in enumerate(range(0, images, batch_size)):
        size = min(batch_size, images - first)
        plans.append(BatchPlan(index, first, size, batch_seed(seed, index)))
    return plans


def batch_seed(seed: int, index: int) -> int:
    """Return a batch's seed, in [0, 2^63); neighbouring batches and seeds share nothing."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def judge(dream: Dream, teacher: Teacher) -> tuple[StoredImages, dict[str, float]]:
    """Quantise a batch as it is stored, and return it with its logits and R_feature by layer.

    R_feature is measured on what is stored, without jitter, each layer unscaled.
    """
    stored = teacher.card.to_stored(dream.images)
    images = teacher.card.normalise(stored)
    with eval_mode(teacher.model), tapped(teacher.model) as tap:
        logits, statistics = tap(images)
    step = InversionStep(images, dream.labels, logits, bn_statistics=statistics)
    per_layer = {name: float(value) for name, value in BNFeature().per_layer(step).items()}
    return StoredImages(stored.cpu(), dream.labels.cpu(), logits.cpu()), per_layer


def student_folder(context: RunContext) -> Path:
    """Return where a run keeps its student."""
    return context.folder / RunContext.STUDENT
