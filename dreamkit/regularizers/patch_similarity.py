"""How much the likeness of patches varies within an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.regularizers.cosines import cosines
from dreamkit.types import InversionStep, Regularizer
from dreamkit.types.needs import supplied

_TAIL = 4.0
"""Bandwidths that the grid goes beyond the ends of [-1, 1], where a kernel is as good as 0."""
_NODES = 8
"""Nodes of the fine grid in a bandwidth."""


@dataclass(frozen=True)
class PatchSimilarity(Regularizer):
    """Minus the entropy of patch similarities: those of noise are all alike, of pictures are not.

    PSAQ-ViT (Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers",
    ECCV 2022): -H(f), where f is the kernel density estimate, by a Gaussian kernel, of the cosine
    similarities between every two patches of an image, and H(f) = -∫ f ln f its differential
    entropy in nats. Here it is of what each block puts out, with two different patches in each
    pair, averaged over images and blocks; the paper adds blocks up, so that its weight is theirs
    times this one's. It lies in about [-ln 2, -ln(4.13 · bandwidth)].

    Args:
        bandwidth: standard deviation of the kernel, in units of the similarity.
        patches: of each image that are compared, evenly spread over it.
    """

    bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.05
    patches: Annotated[int, Field(ge=2)] = 32

    needs = frozenset({"block_outputs"})

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, of shape ()."""
        blocks = supplied(step.block_outputs or None, "block_outputs", self)
        return -torch.stack([self._entropy(block) for block in blocks]).mean()

    def _entropy(self, features: Tensor) -> Tensor:
        similar = cosines(features, self.patches)
        count = similar.shape[-1]
        rows, columns = torch.triu_indices(count, count, 1, device=similar.device)
        return differential_entropy(similar[:, rows, columns], self.bandwidth).mean()


def differential_entropy(values: Tensor, bandwidth: float) -> Tensor:
    """Return the entropy of the kernel density estimate of each row, in nats, (N,).

    Each value is shared out between the two nodes of a fine grid that it lies between, and the
    kernel is laid over these counts: some forty times as fast as over the values, and the
    entropy is off by 2e-3 at the most. The integral is a sum over a grid as wide as the kernel.

    Args:
        values: (N, M), in [-1, 1].
        bandwidth: the Gaussian kernel's standard deviation.
    """
    end = 1 + _TAIL * bandwidth
    points, nodes = (
        torch.linspace(-side, side, count + 1, device=values.device, dtype=values.dtype)
        for side, count in (
            (end, math.ceil(2 * end / bandwidth)),
            (1.0, math.ceil(2 * _NODES / bandwidth)),
        )
    )
    place = (values + 1) / (nodes[1] - nodes[0])
    before = place.detach().floor().clamp(0, len(nodes) - 2).long()  # rounding goes beyond 1
    share = place - before
    counts = values.new_zeros(len(values), len(nodes))
    counts = counts.scatter_add(1, before, 1 - share).scatter_add(1, before + 1, share)
    kernel = ((nodes.unsqueeze(1) - points) / bandwidth).square().mul(-0.5).exp()
    density = counts @ kernel / (values.shape[1] * bandwidth * math.sqrt(2 * math.pi))
    # ln 0 has no gradient; what is so small adds nothing.
    width = points[1] - points[0]
    return -(density * density.clamp(min=1e-12).log()).sum(1) * width
