"""How far a batch's feature statistics are from training's, in a unit that a person can judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dreamkit.regularizers.bn_feature import divisors, relative_distance
from dreamkit.types import ImageStatistics, LayerStatistics

_LEAST_SPREAD = 0.1
"""Of one image, by chance: below every layer of the networks that were measured on real images."""


@torch.no_grad()
def statistics_distance(layers: Sequence[LayerStatistics]) -> dict[str, float]:
    """Return, by layer, the distance of a batch of N images as a multiple of chance.

    The distance is the root of the mean over channels of ((μ̂ - μ)² + (σ̂ - σ)²)/σ². N images of
    training would have one too, by chance alone: the root of the mean over channels of
    s²/N, with s² = Var(mᵢ)/σ² + Var(cᵢ)/(4σ⁴), where mᵢ is the mean of one image over positions,
    cᵢ its mean of (x - μ̂)², and the variances are over images (the delta method). At 1.0 the batch
    is as near as an equal number of training images.

    Without data the variances over training images are not known; those over the batch's own
    images stand for them, with the larger of σ̂ and σ in place of σ, so that a batch of wild
    contrasts does not lengthen the ruler that it is measured by.

    Args:
        layers: of one batch, with the statistics of each image.

    Returns:
        Multiples, >= 0; empty for a batch of one image, which shows no spread.
    """
    return {
        layer.name: math.sqrt(relative_distance(layer)) / _by_chance(layer, layer.images)
        for layer in layers
        if layer.images is not None and len(layer.images.mean) > 1
    }


def overall(distances: Mapping[str, float]) -> float | None:
    """Return the mean over layers; None where there are none."""
    return sum(distances.values()) / len(distances) if distances else None


def _by_chance(layer: LayerStatistics, images: ImageStatistics) -> float:
    var = divisors(layer.running_var).maximum(layer.var)
    squares = images.var + (images.mean - layer.mean).square()
    of_one = (images.mean.var(0) / var + squares.var(0) / (4 * var.square())).mean().sqrt()
    return float(of_one.clamp(min=_LEAST_SPREAD)) / math.sqrt(len(images.mean))
