"""What networks that did not take part in dreaming see in the dreams.

DeepInversion (Yin et al., CVPR 2020), Table 2: images dreamed from one network are classified by
others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.accuracy import images_at_once
from dreamkit.evaluation.features import find_layer, pooled
from dreamkit.evaluation.frechet_distance import Gaussian
from dreamkit.model_state import eval_mode, inputs_of
from dreamkit.out_of_memory import InParts
from dreamkit.resizing import resized
from dreamkit.types import NO_LABEL, Images, Teacher


def as_seen_by(card: Card, stored: Tensor) -> Tensor:
    """Prepare images for a network other than the one they were made for.

    An image of another size is resized whole, without cropping: bilinear, antialiased, on 8-bit
    pixels and not rounded again. Then it is normalised by the network's own card.

    Args:
        card: the network's.
        stored: (N, C, H, W) uint8.

    Returns:
        (N, *card.input_size) float32.

    Raises:
        DreamkitError: the images have other channels than the network takes.
    """
    channels, *size = card.input_size
    if stored.shape[1] != channels:
        raise DreamkitError(
            f"the images have {stored.shape[1]} channels, {card.name} takes {channels}"
        )
    return card.normalise(resized(stored, size))


@dataclass(frozen=True)
class Observed:
    """What a network made of a set of images.

    Args:
        logits: (N, K), on the CPU.
        labels: (N,), the classes the images carry, or ``NO_LABEL``.
        features: moments of its features at a layer, where one was asked for.
    """

    logits: Tensor
    labels: Tensor
    features: Gaussian | None = None

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy on the images that have labels, in [0, 1]; None where none has."""
        known = self.labels != NO_LABEL
        if not known.any():
            return None
        return float((self.logits.argmax(1) == self.labels)[known].float().mean())


@torch.no_grad()
def observe(
    verifier: Teacher,
    images: Images,
    device: torch.device,
    layer: str | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Observed:
    """Show every image to a network, once, in batches.

    Args:
        verifier: on ``device``; it is left as it was.
        images: at least one.
        device: where the network is.
        layer: the module whose input is averaged over positions and kept as moments; of a module
            that is called more than once in a pass, the last call's. None keeps logits alone.
        advance: told how many images are done.

    Raises:
        DreamkitError: the network does not take the images, never calls the layer, or returns
            values that are not finite.
    """
    model, card = verifier.model, verifier.card
    watched = [find_layer(model, card, layer)] if layer is not None else []
    logits, labels, features = [], [], None
    with eval_mode(model), inputs_of(watched) as tap:

        def seen(stored: Tensor) -> Tensor:
            """Return logits and, behind them, the layer's features of each image."""
            columns = [model(as_seen_by(card, stored.to(device))).float()]
            for name, module in watched:
                if name not in tap.inputs:
                    raise DreamkitError(f"{card.name} never calls its module '{layer}'", ("layer",))
                columns.append(pooled(module, tap.inputs[name]).float())
            return torch.cat(columns, 1).cpu()

        in_parts = InParts(seen)
        at_once = images_at_once(card.input_size, device)
        for first in range(0, len(images), at_once):
            stored, given = images.batch(range(first, min(first + at_once, len(images))))
            found = in_parts(stored)
            logits.append(found[:, : card.num_classes])
            labels.append(given)
            if watched:
                part = Gaussian.of(found[:, card.num_classes :])
                features = part if features is None else features.joined(part)
            advance(first + len(stored))
    observed = Observed(torch.cat(logits), torch.cat(labels), features)
    if not observed.logits.isfinite().all():
        raise DreamkitError(f"{card.name} returns values that are not finite for these images")
    return observed
