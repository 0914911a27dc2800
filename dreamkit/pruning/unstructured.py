"""Pruning of single weights: which of them go, and keeping them gone while the rest is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import prune

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def prune_weights(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Set the smallest weights of all convolutions and linear layers together to zero, in place.

    Global unstructured ℓ1 pruning (``torch.nn.utils.prune``); biases and normalisation stay.

    Args:
        model: whose weights.
        sparsity: share of them that goes, in (0, 1).

    Returns:
        By parameter name, what is left: 1, and 0 for what is gone.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    prune.global_unstructured(
        [(layer, "weight") for _, layer in layers], prune.L1Unstructured, amount=sparsity
    )
    masks = {}
    for name, layer in layers:
        mask = layer.get_buffer("weight_mask")
        masks[f"{name}.weight" if name else "weight"] = mask.clone()
        prune.remove(layer, "weight")
    return masks


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


def sparsity_of(model: nn.Module) -> float:
    """Return the share of zeros among the weights of convolutions and linear layers."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, _LAYERS)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))
