"""Batches of dreams: how they are planned, and what is stored of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamkit.model_state import eval_mode
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.types import BatchPlan, Dream, InversionStep, StoredImages, Synthesizer, Teacher


def batch_plans(images: int, batch_size: int, seed: int) -> list[BatchPlan]:
    """Divide images into batches, each with a seed from the recipe's and its index alone."""
    plans = []
    for index, first in enumerate(range(0, images, batch_size)):
        size = min(batch_size, images - first)
        plans.append(BatchPlan(index, first, size, batch_seed(seed, index)))
    return plans


def classes_left_out(synthesizer: Synthesizer, num_classes: int) -> str | None:
    """Return a sentence if there are more classes to show than images; None if not.

    Args:
        synthesizer: its option ``labels``, if it has one, says which classes.
        num_classes: of the teacher.
    """
    labels, images = getattr(synthesizer, "labels", "random"), synthesizer.images
    classes = num_classes if isinstance(labels, str) else len(set(labels))
    if images >= classes:
        return None
    most, least = ("at most ", "at least ") if labels == "random" else ("", "")
    shown = f"{most}{images} {'is' if images == 1 else 'are'} shown"
    lacking = classes - images
    gets = "gets" if lacking == 1 else "get"
    return f"images: {images} for {classes} classes: {shown}, {least}{lacking} {gets} no image"


def batch_seed(seed: int, index: int) -> int:
    """Return a batch's seed, in [0, 2^63); neighbouring batches and seeds share nothing."""
    return derived_seed(seed, str(index))


@torch.no_grad()
def as_stored(dream: Dream, teacher: Teacher) -> tuple[StoredImages, dict[str, float]]:
    """Quantise a batch as it is stored, and return it with its logits and R_feature by layer.

    R_feature is measured on what is stored, without jitter, each layer unscaled.
    """
    stored = teacher.card.to_stored(dream.images)
    logits, per_layer = feature_distances(stored, dream.labels, teacher)
    return StoredImages(stored.cpu(), dream.labels.cpu(), logits.cpu()), per_layer


@torch.no_grad()
def feature_distances(
    stored: Tensor, labels: Tensor, teacher: Teacher
) -> tuple[Tensor, dict[str, float]]:
    """Return a teacher's logits of a batch, and R_feature of eq. 4 by layer, unscaled.

    Args:
        stored: (N, C, H, W) uint8.
        labels: (N,).
        teacher: where the images are.
    """
    images = teacher.card.normalise(stored)
    with eval_mode(teacher.model), tapped(teacher.model) as tap:
        logits, statistics = tap(images)
    step = InversionStep(images, labels, logits, bn_statistics=statistics)
    distances = BNFeature().per_layer(step)
    return logits, {name: float(value) for name, value in distances.items()}
