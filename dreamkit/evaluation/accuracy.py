"""How often a model is right, and how often it agrees with another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.model_state import eval_mode
from dreamkit.types import Images

_BATCH = 256


@torch.no_grad()
def predict(
    model: nn.Module, images: Images, card: Card, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the predicted class of every image (N,) and the labels (N,), in order, on the CPU.

    Where there are several ranks each does a part, and has all of it in the end.
    """
    starts = range(0, len(images), _BATCH)
    mine = {}
    with eval_mode(model):
        for first in starts[distributed.rank() :: distributed.size()]:
            stored, given = images.batch(range(first, min(first + _BATCH, len(images))))
            mine[first] = model(card.normalise(stored.to(device))).argmax(1).cpu(), given
    found = {first: pair for part in distributed.gather(mine) for first, pair in part.items()}
    predicted, labels = zip(*(found[first] for first in starts), strict=True)
    return torch.cat(predicted), torch.cat(labels)


def accuracy(model: nn.Module, images: Images, card: Card, device: torch.device) -> float:
    """Return top-1 accuracy on labelled images, in [0, 1]."""
    predicted, labels = predict(model, images, card, device)
    return float((predicted == labels).float().mean())


def agreement(
    model: nn.Module, teacher: nn.Module, images: Images, card: Card, device: torch.device
) -> float:
    """Return how often two models predict the same class, in [0, 1]; labels are not used."""
    ours, _ = predict(model, images, card, device)
    theirs, _ = predict(teacher, images, card, device)
    return float((ours == theirs).float().mean())
