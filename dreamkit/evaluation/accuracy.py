"""How often a model is right, and how often it agrees with another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.model_state import eval_mode
from dreamkit.out_of_memory import InParts
from dreamkit.types import Images

_BATCH = 256
_PIXELS = 32 * 224 * 224
"""Of a pass on a CPU: wide layers keep a kilobyte of activations and more for each."""
NO_CLASS = -2
"""Predicted of nothing; no label equals it, nor ``NO_LABEL``."""

Advance = Callable[[int], None]
"""Told how many images are done."""


def unheard(images: int) -> None:
    """Tell nobody."""


def images_at_once(size: tuple[int, ...], device: torch.device) -> int:
    """Return how many images of a size (C, H, W) go through a network at once.

    On a CPU few large ones: more at once are no faster, and fill the memory.
    """
    if device.type != "cpu":
        return _BATCH
    return max(1, min(_BATCH, _PIXELS // (size[1] * size[2])))


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    card: Card,
    device: torch.device,
    advance: Advance = unheard,
) -> tuple[Tensor, Tensor]:
    """Return the predicted class of every image (N,) and the labels (N,), in order, on the CPU.

    Outputs that are not finite are of no class, ``NO_CLASS``. Where there are several ranks
    each does a part, and has all of it in the end. Batches that memory is short of are done in
    parts.
    """
    at_once = images_at_once(card.input_size, device)
    starts = range(0, len(images), at_once)
    mine = {}
    classes = InParts(lambda stored: _classes(model(card.normalise(stored.to(device)))))
    with eval_mode(model):
        for first in starts[distributed.rank() :: distributed.size()]:
            stored, given = images.batch(range(first, min(first + at_once, len(images))))
            mine[first] = classes(stored), given
            advance(first + len(stored))
    found = {first: pair for part in distributed.gather(mine) for first, pair in part.items()}
    predicted, labels = zip(*(found[first] for first in starts), strict=True)
    return torch.cat(predicted), torch.cat(labels)


def _classes(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NO_CLASS).cpu()


def accuracy(
    model: nn.Module,
    images: Images,
    card: Card,
    device: torch.device,
    advance: Advance = unheard,
) -> float:
    """Return top-1 accuracy on labelled images, in [0, 1]."""
    predicted, labels = predict(model, images, card, device, advance)
    return float((predicted == labels).float().mean())


def agreement(
    model: nn.Module,
    teacher: nn.Module,
    images: Images,
    card: Card,
    device: torch.device,
    advance: Advance = unheard,
) -> float:
    """Return how often two models predict the same class, in [0, 1]; labels are not used.

    ``advance`` is told twice the images: each goes through both.
    """
    ours, _ = predict(model, images, card, device, advance)
    done = len(images)
    theirs, _ = predict(teacher, images, card, device, lambda more: advance(done + more))
    return float((ours == theirs).float().mean())
