"""Feature statistics of the batch against those the teacher stored in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.types import InversionStep, Regularizer


@dataclass(frozen=True)
class BNFeature(Regularizer):
    """Distance of the batch's feature statistics from those in the teacher's BatchNorm layers.

    DeepInversion (Yin et al., CVPR 2020), R_feature of eq. 4: the sum over layers of
    ‖μ(x̂) - running_mean‖₂ + ‖σ²(x̂) - running_var‖₂, on the inputs of every BatchNorm layer.

    Args:
        first_layer_scale: factor on the first layer's part (10 in the authors' ImageNet setting).
    """

    first_layer_scale: Annotated[float, Field(ge=0)] = 1.0

    needs = frozenset({"bn_statistics"})

    def per_layer(self, step: InversionStep) -> dict[str, Tensor]:
        """Return each layer's unscaled part, of shape (), by the layer's name."""
        return {
            layer.name: (layer.mean - layer.running_mean).norm()
            + (layer.var - layer.running_var).norm()
            for layer in step.bn_statistics
        }

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        parts = torch.stack(list(self.per_layer(step).values()))
        return parts.sum() + (self.first_layer_scale - 1) * parts[0]
