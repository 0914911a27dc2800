"""Giving BatchNorm layers the statistics of the network as it now is."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dreamkit.card import Card
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.batches import in_order
from dreamkit.types import Images


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    images: Images,
    card: Card,
    device: torch.device,
    batches: int,
    batch_size: int,
) -> None:
    """Recompute every BatchNorm's running statistics over some batches of images.

    Pruned channels shift what later layers see; accuracy read before this is meaningless. These
    are population statistics (precise BN, Wu and Johnson 2021), each layer fed by layers that
    normalise with their batch's own. fvcore's version takes E[x²] - E[x]² in float32, which turns
    negative for channels of large mean; here moments are merged as Chan et al. (1983) do.

    Args:
        model: changed in its BatchNorm buffers alone; modes are kept.
        images: stored images.
        card: how to normalise them.
        device: where the model is.
        batches: how many batches at the most.
        batch_size: images in each; a last batch of one image is left out.
    """
    layers = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    seen: dict[nn.Module, _Moments] = {layer: _Moments() for layer in layers}
    momenta = [layer.momentum for layer in layers]
    try:
        with (
            eval_mode(model),
            hooked(
                (("", layer) for layer in layers), lambda _, layer, x: seen[layer].add(x.float())
            ),
        ):
            for layer in layers:
                layer.train()
                layer.momentum = 0.0  # the forward pass itself leaves what is stored alone
            for stored, _ in itertools.islice(in_order(images, batch_size), batches):
                if len(stored) > 1 or len(images) == 1:
                    model(card.normalise(stored.to(device)))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for layer in layers:
        moments = seen[layer]
        if moments.count:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(moments.mean)
            layer.running_var.copy_(moments.squares / moments.count)


class _Moments:
    """Channels' means and sums of squared deviations, merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        total = self.count + count
        shift = mean - self.mean.to(mean)
        between = shift.square() * (self.count * count / total)
        self.squares = self.squares.to(mean) + var * count + between
        self.mean = self.mean.to(mean) + shift * (count / total)
        self.count = total
