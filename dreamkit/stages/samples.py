"""Which of a run's images are for what: to fit a network, or to compare it with its teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamkit.seeds import stream
from dreamkit.training.batches import Subset
from dreamkit.types import Images

COMPARED = 8192
"""Images on which a model is compared with its teacher at the most: half a percent of doubt."""
FEW = 256
"""Where half of the images are fewer than these, a model is compared on all of them."""


def compared_sample(images: Images, seed: int) -> Subset:
    """Return the images on which models are compared with their teacher.

    Half of them, up to ``COMPARED``; all where they are few. ``fitting_sample`` takes others as
    long as there are others.

    Args:
        images: that the models are made on.
        seed: the run's.
    """
    return Subset(images, _compared(len(images), seed).tolist())


def fitting_sample(images: Images, count: int, seed: int, purpose: str) -> Subset:
    """Return at most ``count`` images to rank, fit or calibrate on, drawn at random.

    Those that models are compared on come last.

    Args:
        images: that there are.
        count: >= 0.
        seed: the run's.
        purpose: what they are for; each has a draw of its own.
    """
    compared = torch.zeros(len(images), dtype=torch.bool)
    compared[_compared(len(images), seed)] = True
    order = torch.randperm(len(images), generator=stream(seed, purpose))
    order = torch.cat([order[~compared[order]], order[compared[order]]])
    return Subset(images, order[:count].tolist())


def _compared(size: int, seed: int) -> Tensor:
    count = min(COMPARED, size // 2 if size // 2 >= FEW else size)
    return torch.randperm(size, generator=stream(seed, "agreement"))[:count]
