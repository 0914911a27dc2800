"""Giving BatchNorm layers the statistics of the network as it now is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dreamkit import distributed
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.moments import Moments

_Layer = TypeVar("_Layer", bound=nn.Module)
_DEAD = 1e-3
"""Share of its former variance below which a channel is taken for dead."""


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


@torch.no_grad()
def refresh(
    model: nn.Module,
    batches: NormalisedBatches,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Let every BatchNorm state what it is given, and compute in eval mode what it did.

    A network that was trained with its running statistics frozen no longer sees what they say, and
    dreams of it would be held to what it was. They are measured anew, and scale and shift
    make up for the difference: γ' = γ σ'/σ, β' = β + γ (μ' - μ) / σ. Layers without scale or
    shift stay as they are, and so do channels that hardly vary any more.

    Args:
        model: changed in its BatchNorm layers alone; modes are kept.
        batches: of images, of all that it is to be used on, where the model is.
        advance: told how many batches are done.
    """
    layers = [m for m in model.modules() if _states_and_scales(m)]
    with eval_mode(model):
        seen = _inputs(model, layers, batches, advance)
    # Ranks may differ in the last bit, and are to have one network.
    found = distributed.broadcast([(m.mean.cpu(), m.variance.cpu()) for m in seen.values()])
    for layer, (mean, variance) in zip(seen, found, strict=True):
        scale, shift, old_mean, old_variance = (
            getattr(layer, name) for name in ("weight", "bias", "running_mean", "running_var")
        )
        mean, variance = mean.to(old_mean), variance.to(old_variance)
        # A channel that these images leave dead would be blown up as soon as one wakes it.
        dead = variance < _DEAD * old_variance
        mean, variance = (
            torch.where(dead, old_mean, mean),
            torch.where(dead, old_variance, variance),
        )
        eps = float(layer.eps)  # type: ignore[arg-type]
        deviation = (old_variance + eps).sqrt()
        shift.add_(scale * (mean - old_mean) / deviation)
        scale.mul_((variance + eps).sqrt() / deviation)
        old_mean.copy_(mean)
        old_variance.copy_(variance)


def _states_and_scales(module: nn.Module) -> bool:
    """Whether a layer normalises by running statistics, frozen or not, and has scale and shift."""
    names = ("running_mean", "running_var", "weight", "bias")
    return hasattr(module, "eps") and all(
        isinstance(getattr(module, name, None), Tensor) for name in names
    )


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _inputs(
    model: nn.Module,
    layers: Sequence[_Layer],
    batches: NormalisedBatches,
    advance: Callable[[int], None],
) -> dict[_Layer, Moments]:
    """Return the moments of what layers are given, of those that are reached."""
    seen: dict[_Layer, Moments] = {}
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
