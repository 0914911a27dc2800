"""Feature statistics of the batch against those the teacher stored in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.types import InversionStep, LayerStatistics, Regularizer
from dreamkit.types.needs import supplied

_FLOOR = 1e-3
"""Least variance of a channel that is divided by, as a share of its layer's mean."""
_EPS = 1e-5
"""Least variance of all: what BatchNorm itself adds to each, unless told otherwise."""


@dataclass(frozen=True)
class BNFeature(Regularizer):
    """Distance of the batch's feature statistics from those in the teacher's BatchNorm layers.

    DeepInversion (Yin et al., CVPR 2020), eq. 4 to 6, on the inputs of every BatchNorm layer.

    Args:
        form: ``relative`` is the mean over layers of the mean over channels of
            ((μ̂ - μ)² + (σ̂ - σ)²)/σ², which is of one size for all networks, so that one weight
            (30) serves them. ``paper`` is R_feature of eq. 4, the sum over layers of
            ‖μ(x̂) - running_mean‖₂ + ‖σ²(x̂) - running_var‖₂, whose size and so whose weight
            depend on the network.
        first_layer_scale: factor on the first layer's part (10 in the authors' ImageNet setting).
    """

    form: Literal["relative", "paper"] = "relative"
    first_layer_scale: Annotated[float, Field(ge=0)] = 1.0

    needs = frozenset({"bn_statistics"})

    def per_layer(self, step: InversionStep) -> dict[str, Tensor]:
        """Return each layer's unscaled part, of shape (), by the layer's name."""
        distance = _absolute if self.form == "paper" else relative_distance
        return {layer.name: distance(layer) for layer in step.bn_statistics}

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        layers = supplied(step.bn_statistics or None, "bn_statistics", self)
        more = self.first_layer_scale - 1
        if self.form == "paper":
            total = torch.stack([_absolute(layer) for layer in layers]).sum()
            return total + more * _absolute(layers[0]) if more else total
        total = relative_distance(*layers)
        return total + more / len(layers) * relative_distance(layers[0]) if more else total


def _absolute(layer: LayerStatistics) -> Tensor:
    off: Tensor = (layer.mean - layer.running_mean).norm()
    return off.add((layer.var - layer.running_var).norm())


def relative_distance(*layers: LayerStatistics) -> Tensor:
    """Return the mean over layers of the mean over channels of ((μ̂ - μ)² + (σ̂ - σ)²)/σ².

    Per channel it is the squared 2-Wasserstein distance between two Gaussians, in units of σ².
    Layers' channels are joined into one vector: thirty small operations on each layer, there and
    back, would be a noticeable part of a step.

    Returns:
        Of shape ().
    """
    off = torch.cat([layer.mean - layer.running_mean for layer in layers])
    seen = torch.cat([layer.var for layer in layers])
    stored = torch.cat([layer.running_var for layer in layers])
    units = [divisors(layer.running_var) for layer in layers]
    # A root has no gradient at 0: a channel that is dead in the batch is left where it is.
    deviation = seen.maximum(1e-8 * torch.cat(units)).sqrt()
    spread_off = (deviation - stored.clamp(min=0).sqrt()).square()
    share = torch.cat([var * len(var) for var in units])
    return ((off.square() + spread_off) / share).sum() / len(layers)


def divisors(running_var: Tensor) -> Tensor:
    """Return the variances (C,) that deviations of a layer's channels are divided by, all > 0.

    A channel that is dead in training, or a layer, has no spread to measure by.
    """
    return running_var.clamp(min=_FLOOR * running_var.mean()).clamp(min=_EPS)
