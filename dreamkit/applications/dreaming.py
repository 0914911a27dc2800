"""From a source in a recipe to images: dreamed first where the source is the run's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError, placed
from dreamkit.model_state import eval_mode
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.store.dreams import DreamStore, ShardedImages
from dreamkit.store.source import Dreams
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.types import (
    BatchPlan,
    Dream,
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
    store = DreamStore(
        context.folder / RunContext.DREAMS,
        {
            "seed": context.seed,
            "teacher_sha256": context.teacher.card.weights_sha256,
            "synthesis": context.recipe["synthesis"],
        },
    )
    plans = batch_plans(synthesizer, context.seed)
    missing = [plan for plan in plans if plan.index not in store]
    if missing:
        if len(missing) < len(plans):
            context.log.note(f"resuming: {len(plans) - len(missing)} of {len(plans)} batches kept")
        _dream(context, synthesizer, store, missing)
    context.metrics["synthesis.images"] = len(store)
    context.metrics["synthesis.seconds"] = store.seconds
    context.metrics["synthesis.images_per_second"] = len(store) / max(store.seconds, 1e-9)
    if store.r_feature is not None:
        context.metrics["synthesis.r_feature"] = store.r_feature
    content = store.open()
    right = content.teacher_logits.argmax(1) == content.labels
    context.metrics["synthesis.teacher_accuracy"] = float(right.float().mean())
    return content


def batch_plans(synthesizer: Synthesizer, seed: int) -> list[BatchPlan]:
    """Divide the images into batches, each with a seed from the recipe's and its index alone."""
    plans = []
    for index, first in enumerate(range(0, synthesizer.images, synthesizer.batch_size)):
        size = min(synthesizer.batch_size, synthesizer.images - first)
        plans.append(BatchPlan(index, first, size, batch_seed(seed, index)))
    return plans


def batch_seed(seed: int, index: int) -> int:
    """Return a batch's seed, in [0, 2^63); neighbouring batches and seeds share nothing."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _dream(
    context: RunContext, synthesizer: Synthesizer, store: DreamStore, plans: list[BatchPlan]
) -> None:
    steps = synthesizer.steps_per_batch
    every = max(1, steps // _CURVE_POINTS)
    with (
        synthesizer.session(context.teacher, context.device) as dreamer,
        context.log.progress("synthesis", len(plans) * steps) as advance,
    ):
        for number, plan in enumerate(plans):

            def on_step(
                done: int,
                terms: Mapping[str, Tensor],
                number: int = number,
                index: int = plan.index,
            ) -> None:
                advance(number * steps + done)
                if done % every == 0 or done == steps:
                    values = {name: float(value) for name, value in terms.items()}
                    context.log.record("synthesis", index * steps + done, values)

            start = time.perf_counter()
            dream = dreamer.dream(plan, on_step)
            content, per_layer = judge(dream, context.teacher)
            r_feature = sum(per_layer.values()) if per_layer else None
            seconds = time.perf_counter() - start
            store.write(plan.index, content, seconds, dream.loss, r_feature)
            if r_feature is not None:
                context.log.record("batches", plan.index, {"r_feature": r_feature})
                context.log.record("r_feature by layer", plan.index, per_layer)


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
