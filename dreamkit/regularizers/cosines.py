"""How alike the patches of images are to a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosines(features: Tensor, most: int) -> Tensor:
    """Return the cosine similarity of every two features.

    Args:
        features: (..., P, C).
        most: features that are compared, evenly spread; fewer if there are fewer.

    Returns:
        (..., p, p), in [-1, 1]; p is the lesser of P and ``most``. A feature of zeros has
        similarity 0, to itself too.
    """
    count = features.shape[-2]
    if count > most:
        features = features.index_select(-2, evenly_spread(count, most, features.device))
    unit = F.normalize(features, dim=-1)
    return unit @ unit.transpose(-1, -2)


def evenly_spread(count: int, most: int, device: torch.device) -> Tensor:
    """Return the places of ``most`` things among ``count``, the first and the last among them.

    Returns:
        (n,) int64, n being the lesser of both.
    """
    number = min(count, most)
    return torch.arange(number, device=device) * (count - 1) // max(number - 1, 1)
