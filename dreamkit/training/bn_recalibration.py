"""Giving BatchNorm layers the statistics of the network as it now is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.moments import Moments


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: NormalisedBatches,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Recompute every BatchNorm's running statistics over some batches of images.

    Pruned channels shift what later layers see; accuracy read before this is meaningless. These
    are population statistics (precise BN, Wu and Johnson 2021), each layer fed by layers that
    normalise with their batch's own.

    Args:
        model: changed in its BatchNorm buffers alone; modes are kept.
        batches: of images, where the model is; a last one of one image is left out. Layers that
            are given one value a channel, and so no variance, keep the statistics that they have.
        advance: told how many batches are done.
    """
    layers = _layers(model)
    momenta = [layer.momentum for layer in layers]
    try:
        with eval_mode(model):
            for layer in layers:
                layer.train()
                layer.momentum = 0.0  # the forward pass itself leaves what is stored alone
            seen = _inputs(model, layers, batches, advance)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for layer, moments in seen.items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.variance)


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _inputs(
    model: nn.Module,
    layers: Sequence[_BatchNorm],
    batches: NormalisedBatches,
    advance: Callable[[int], None],
) -> dict[_BatchNorm, Moments]:
    """Return the moments of what layers are given, of those that are reached."""
    seen: dict[_BatchNorm, Moments] = {}
    named = ((str(number), layer) for number, layer in enumerate(layers))

    def see(number: str, layer: nn.Module, x: Tensor) -> None:
        if x.numel() > x.shape[1]:
            watched = layers[int(number)]
            seen[watched] = Moments.of(x).merged(seen.get(watched))
        else:  # one value a channel: torch refuses to normalise that by itself
            layer.eval()

    with hooked(named, see):
        for number, x in enumerate(batches, 1):
            if len(x) > 1 or len(batches.images) == 1 or batches.batch_size == 1:
                model(x)
            advance(number)
    return seen
