"""Giving BatchNorm layers the statistics of the network as it now is."""

from __future__ import annotations

import itertools
import logging

import torch
from torch import nn

from dreamkit.fvcore import update_bn_stats
from dreamkit.model_state import eval_mode
from dreamkit.training.batches import in_order
from dreamkit.types import Card, Images


def recalibrate(
    model: nn.Module,
    images: Images,
    card: Card,
    device: torch.device,
    batches: int,
    batch_size: int,
) -> None:
    """Recompute every BatchNorm's running statistics over some batches of images.

    Pruned channels shift what later layers see; accuracy read before this is meaningless. Uses
    fvcore's precise BN (Wu and Johnson 2021): population statistics, not a running average.

    Args:
        model: changed in its BatchNorm buffers alone; modes are kept.
        images: stored images.
        card: how to normalise them.
        device: where the model is.
        batches: how many batches at the most.
        batch_size: images in each.
    """
    logging.getLogger("fvcore.nn.precise_bn").setLevel(logging.WARNING)
    count = min(batches, -(-len(images) // batch_size))
    inputs = (
        card.normalise(stored.to(device))
        for stored, _ in itertools.islice(in_order(images, batch_size), count)
    )
    with eval_mode(model):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        update_bn_stats(model, inputs, count)
