"""Channels' mean outputs against the shifts of the layers that put them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import InversionStep, NormMeans, Regularizer
from dreamkit.types.needs import supplied


@dataclass(frozen=True)
class FeaturePrior(Regularizer):
    """Squared distance of channels' mean outputs from the shift of their LayerNorm or GroupNorm.

    Σ_c (mean_c - β_c)² / Σ_c γ_c², averaged over layers. Such a layer normalises every position
    across channels, then scales channel c by γ_c and shifts it by β_c; BatchNorm would leave the
    channel at β_c on average. Here nothing makes it, and how near training came to it depends on
    the layer: in the deep ones of small networks real images have less than noise, in the first
    ones not. 0 where all channels are at their shift; about 1 where none varies and γ is even. It
    is no published term.
    """

    needs = frozenset({"norm_means"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        layers = supplied(step.norm_means or None, "norm_means", self)
        return torch.stack([_from_shift(layer) for layer in layers]).mean()


def _from_shift(layer: NormMeans) -> Tensor:
    # What is seen is normalised, not yet scaled and shifted: so the shift itself falls out.
    spread = layer.scale.square()
    return (layer.mean.square() * spread).sum() / spread.sum().clamp(min=1e-12)
