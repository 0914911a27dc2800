"""Batches of dreams: how they are planned, and what is stored of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dreamkit.model_state import eval_mode
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.seeds import derived_seed
from dreamkit.stages.statistics_distance import statistics_distance
from dreamkit.synthesizers.automatic_terms import terms_for
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.synthesizers.labels import with_class
from dreamkit.types import (
    BatchPlan,
    Dream,
    Dreamer,
    InversionStep,
    StoredImages,
    Synthesizer,
    TakingTurns,
    Teacher,
)


def batch_plans(images: int, batch_size: int, seed: int) -> list[BatchPlan]:
    """Divide images into batches, each with a seed from the recipe's and its index alone."""
    return _plans([min(batch_size, images - first) for first in range(0, images, batch_size)], seed)


def plans_of(dreamer: Dreamer, images: int, seed: int) -> list[BatchPlan]:
    """Divide images into a dreamer's batches, as ``batch_plans`` does."""
    if isinstance(dreamer, TakingTurns):
        return _plans(dreamer.batch_sizes, seed)
    return batch_plans(images, dreamer.batch_size, seed)


def _plans(sizes: Sequence[int], seed: int) -> list[BatchPlan]:
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        BatchPlan(index, first, size, batch_seed(seed, index))
        for index, (first, size) in enumerate(zip(firsts, sizes, strict=False))
    ]


def known_batches(synthesizer: Synthesizer, teacher: Teacher) -> int | None:
    """Return how many batches of dreams there are to be; None if a session settles it."""
    batches = 0
    for member in synthesizer.members:
        size = member.known_batch_size(teacher)
        if size is None:
            return None
        batches += math.ceil(member.images / size)
    return batches


def doubts_of(synthesizer: Synthesizer, dreamer: Dreamer, teacher: Teacher) -> list[str]:
    """Return what is doubtful of the numbers of images asked for, a sentence each.

    Args:
        synthesizer: what is asked for.
        dreamer: the same at work.
        teacher: that it works on.
    """
    members = synthesizer.members
    lacking = [classes_left_out(member, teacher.card.num_classes) for member in members]
    found = lacking[:1] if all(lacking) else []  # what one leaves out another may show
    dreamers = dreamer.dreamers if isinstance(dreamer, TakingTurns) else [dreamer]
    for member, own in zip(members, dreamers, strict=True):
        found.append(small_batches(member, own.batch_size, teacher))
    return [doubt for doubt in found if doubt is not None]


def classes_left_out(synthesizer: Synthesizer, num_classes: int) -> str | None:
    """Return a sentence if there are more classes to show than images; None if not.

    Args:
        synthesizer: its options ``labels`` and ``unconditional``, if it has them, say which
            classes, and how many images show none.
        num_classes: of the teacher.
    """
    labels, images = getattr(synthesizer, "labels", "random"), synthesizer.images
    unconditional = getattr(synthesizer, "unconditional", 0.0)
    images = with_class(images, unconditional)
    if images == 0:  # no class is asked for, so none is missed
        return None
    classes = num_classes if isinstance(labels, str) else len(set(labels))
    if images >= classes:
        return None
    most, least = ("at most ", "at least ") if labels == "random" else ("", "")
    shown = f"{most}{images} {'is' if images == 1 else 'are'} shown"
    lacking = classes - images
    gets = "gets" if lacking == 1 else "get"
    asked = f"{images} with a class" if unconditional else f"{images}"
    return f"images: {asked} for {classes} classes: {shown}, {least}{lacking} {gets} no image"


def small_batches(synthesizer: Synthesizer, batch_size: int, teacher: Teacher) -> str | None:
    """Return a sentence if statistics are matched by very few images; None if not.

    Args:
        synthesizer: its option ``regularizers``, if it has one, says whether they are.
        batch_size: images that are dreamed together, but for the last batch.
        teacher: whose statistics they are.
    """
    terms = terms_for(getattr(synthesizer, "regularizers", ()), teacher)
    images = synthesizer.images
    if not any("bn_statistics" in term.entry.needs for term in terms):
        return None
    if 1 in (images, batch_size):
        return (
            "images are dreamed one by one, and the statistics of each alone are to be those of "
            "all training images: batches of 32 and more make better ones"
        )
    last = images % batch_size
    if images < batch_size or last == 0 or (last > 1 and 4 * last >= batch_size):
        return None
    return (
        f"images: {images} in batches of {batch_size} leave {last} for the last, and so few match "
        f"training's statistics worse: {images - last} or {images - last + batch_size} fill it"
    )


def batch_seed(seed: int, index: int) -> int:
    """Return a batch's seed, in [0, 2^63); neighbouring batches and seeds share nothing."""
    return derived_seed(seed, str(index))


@dataclass(frozen=True)
class BatchQuality:
    """How near a stored batch is to training, by the statistics of the network it came from.

    Args:
        statistics_distance: by layer, as a multiple of chance; empty without BatchNorm, and for a
            batch of one image.
        r_feature: eq. 4 of DeepInversion, unscaled, summed over layers, for comparison with
            published numbers; None without BatchNorm.
    """

    statistics_distance: Mapping[str, float]
    r_feature: float | None


@torch.no_grad()
def as_stored(dream: Dream, teacher: Teacher) -> tuple[StoredImages, BatchQuality]:
    """Quantise a batch as it is stored, and return it with its logits, and what it is worth.

    One pass of the network, without jitter, over what is stored.
    """
    stored = teacher.card.to_stored(dream.images)
    images = teacher.card.normalise(stored)
    with eval_mode(teacher.model), tapped(teacher.model, each_image=True) as tap:
        logits, layers = tap(images)
    step = InversionStep(images, dream.labels, logits, bn_statistics=layers)
    r_feature = float(BNFeature("paper")(step)) if layers else None
    quality = BatchQuality(statistics_distance(layers), r_feature)
    return StoredImages(stored.cpu(), dream.labels.cpu(), logits.cpu()), quality
