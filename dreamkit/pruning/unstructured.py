"""Pruning of single weights: which of them go, and keeping them gone while the rest is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dreamkit.errors import NothingToPrune
from dreamkit.pruning.computed import why_left

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def choose_weights(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Return which weights stay where the smallest of all layers together go.

    Global unstructured ℓ1 pruning (``torch.nn.utils.prune``) of all convolutions and linear
    layers; biases and normalisation stay.

    Args:
        model: whose weights; not changed.
        sparsity: share of them that goes, in (0, 1).

    Returns:
        By parameter name, 1 for what stays and 0 for what goes. Layers whose weight is computed
        from others are not there.

    Raises:
        NothingToPrune: no layer has a weight of its own.
    """
    layers = weighted(model)
    if not layers:
        raise NothingToPrune(
            "no convolution or linear layer has a weight of its own: "
            + "; ".join(f"{name}: {reason}" for name, reason in left_alone(model).items())
            if left_alone(model)
            else "the network has no convolution and no linear layer"
        )
    # torch's pruning registers parameters anew, in another order, and wants them contiguous.
    held = []
    for layer in layers.values():
        holder = nn.Module()
        holder.weight = nn.Parameter(layer.get_parameter("weight").detach().contiguous())
        held.append(holder)
    prune.global_unstructured(
        [(holder, "weight") for holder in held], prune.L1Unstructured, amount=sparsity
    )
    return {
        f"{name}.weight" if name else "weight": holder.get_buffer("weight_mask")
        for name, holder in zip(layers, held, strict=True)
    }


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers that have a weight of their own, by name."""
    return {name: m for name, m in model.named_modules() if _has_own_weight(m)}


def left_alone(model: nn.Module) -> dict[str, str]:
    """Return the layers whose weights stay since others make them, by name, with the reason."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    return {
        name: why_left(m) or "its weight is not its own"
        for name, m in layers
        if not _has_own_weight(m)
    }


def _has_own_weight(layer: nn.Module) -> bool:
    # Layers in TorchScript are none of these, and have no such table.
    return isinstance(layer, _LAYERS) and layer._parameters.get("weight") is not None


@torch.no_grad()
def remove_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set weights to zero in place: by parameter name, those whose mask is 0."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


@contextmanager
def kept_at_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Let no gradient reach the weights that are gone: an optimizer leaves a zero at zero then.

    Weight decay of zero is zero, and so is momentum of gradients that were all zero.
    """
    handles = [
        model.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)
        for name, mask in masks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_layers(model: nn.Module) -> int:
    """Return how many convolutions and linear layers there are."""
    return sum(isinstance(m, _LAYERS) for m in model.modules())


def sparsity_of(model: nn.Module) -> float:
    """Return the share of zeros among the weights of convolutions and linear layers."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, _LAYERS)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))
