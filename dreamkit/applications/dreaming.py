"""From a source in a recipe to images: dreamed first where the source is the run's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError, NonFiniteLoss, placed
from dreamkit.model_state import eval_mode
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.store.dreams import MANIFEST, DreamStore, ShardedImages
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
    Synthesizer,
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
    synthesizer = context.synthesizer
    if synthesizer is None:
        raise DreamkitError("this application dreams, so the recipe needs 'synthesis'")
    store = _store(context)
    for batch in store.skipped.values():
        context.log.note(
            f"batch {batch.index} was left out ({batch.reason}); to try it again, remove it from "
            f"'skipped' in {store.folder / MANIFEST}"
        )
    if store.lacks(synthesizer.images):
        _dream(context, synthesizer, store)
    context.metrics["synthesis.images"] = len(store)
    context.metrics["synthesis.skipped_batches"] = len(store.skipped)
    context.metrics["synthesis.seconds"] = store.seconds
    context.metrics["synthesis.images_per_second"] = len(store) / max(store.seconds, 1e-9)
    if store.r_feature is not None:
        context.metrics["synthesis.r_feature"] = store.r_feature
    content = store.open()
    right = content.teacher_logits.argmax(1) == content.labels
    context.metrics["synthesis.teacher_accuracy"] = float(right.float().mean())
    return content


def _store(context: RunContext) -> DreamStore:
    return DreamStore(
        context.folder / RunContext.DREAMS,
        {
            "seed": context.seed,
            "teacher_sha256": context.teacher.card.weights_sha256,
            "synthesis": context.recipe["synthesis"],
        },
    )


def estimate_synthesis(context: RunContext) -> Estimate | None:
    """Return what dreaming takes that is not done yet, from a few timed steps.

    Nothing is written. None where nothing is left to dream.
    """
    synthesizer = context.synthesizer
    if synthesizer is None:
        return None
    store = _store(context)
    if not store.lacks(synthesizer.images):
        return None
    with synthesizer.session(
        context.teacher, context.device, store.choices, context.log.note
    ) as dreamer:
        return _estimate(context, dreamer, _missing(context, dreamer, store))


def _missing(context: RunContext, dreamer: Dreamer, store: DreamStore) -> list[BatchPlan]:
    """Return the batches that a store lacks."""
    assert context.synthesizer is not None
    plans = batch_plans(context.synthesizer.images, dreamer.batch_size, context.seed)
    done = {*store.shards, *store.skipped}
    missing = [plan for plan in plans if plan.index not in done]
    if len(missing) < len(plans):
        context.log.note(f"resuming: {len(plans) - len(missing)} of {len(plans)} batches kept")
    return missing


def _estimate(context: RunContext, dreamer: Dreamer, plans: list[BatchPlan]) -> Estimate:
    """Prepare for batches, and tell what they will take."""
    images = sum(plan.size for plan in plans)
    start = time.perf_counter()
    cost = dreamer.prepare(images)
    context.metrics["synthesis.preparation_seconds"] = time.perf_counter() - start
    context.metrics["synthesis.estimated_seconds"] = cost.seconds
    context.metrics["synthesis.estimated_memory_bytes"] = float(cost.memory_bytes)
    batches = f"{len(plans)} batches" if len(plans) > 1 else "1 batch"
    context.log.note(
        f"dreaming {images} images in {batches}: about {format_duration(cost.seconds)}, "
        f"{cost.memory_bytes / 2**30:.1f} GB on this {context.device.type.upper()}"
    )
    return cost


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


def _dream(context: RunContext, synthesizer: Synthesizer, store: DreamStore) -> None:
    """Dream the batches that a store lacks."""
    log, steps = context.log, synthesizer.steps_per_batch
    every = max(1, steps // _CURVE_POINTS)
    with synthesizer.session(context.teacher, context.device, store.choices, log.note) as dreamer:
        missing = _missing(context, dreamer, store)
        _estimate(context, dreamer, missing)
        if not store.choices:
            store.choices = dict(dreamer.choices)
        elif store.choices != dreamer.choices:
            log.note(
                f"the dreams that are kept were made with {store.choices}, and the rest are made "
                f"with {dict(dreamer.choices)}: an undisturbed run's would differ a little"
            )
        with log.progress("synthesis", len(missing) * steps) as advance:
            for number, plan in enumerate(missing):

                def on_step(
                    done: int,
                    terms: Mapping[str, Tensor],
                    number: int = number,
                    index: int = plan.index,
                ) -> None:
                    advance(number * steps + done)
                    if done % every == 0 or done == steps:
                        values = {name: float(value) for name, value in terms.items()}
                        log.record("synthesis", index * steps + done, values)

                start = time.perf_counter()
                try:
                    dream = dreamer.dream(plan, on_step)
                except NonFiniteLoss as error:
                    log.note(f"batch {plan.index} is left out: {error.message}")
                    store.skip(plan.index, plan.size, error.message)
                    continue
                content, per_layer = judge(dream, context.teacher)
                r_feature = sum(per_layer.values()) if per_layer else None
                seconds = time.perf_counter() - start
                store.write(plan.index, content, seconds, dream.loss, r_feature)
                advance((number + 1) * steps)  # a batch may stop early
                if r_feature is not None:
                    log.record("batches", plan.index, {"r_feature": r_feature})
                    log.record("r_feature by layer", plan.index, per_layer)
    if len(store) == 0:
        raise DreamkitError("no batch of dreams came to anything; see the notes above")


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
