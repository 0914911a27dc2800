"""What layers of a network that is inverted see of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageStatistics:
    """What one BatchNorm layer saw of each image: mean and biased variance, each (N, C)."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What one BatchNorm layer saw of a batch, and what it stores of its training; each (C,).

    Args:
        name: the layer's.
        mean: over the batch and all positions.
        var: the same, biased.
        running_mean: what the layer stores.
        running_var: what the layer stores.
        images: of each image by itself; only where that was asked for.
    """

    name: str
    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    images: ImageStatistics | None = None


@dataclass(frozen=True)
class NormMeans:
    """What a LayerNorm or GroupNorm makes of a batch before its scale and shift; each (C,).

    Args:
        name: the layer's.
        mean: of each channel as normalised, over images and positions.
        scale: γ, which is multiplied by next.
    """

    name: str
    mean: Tensor
    scale: Tensor
