"""What a layer of a network is given, image by image: which layer, and averaged how."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.model_state import device_of, eval_mode, hooked

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


def pooled(module: nn.Module, features: Tensor) -> Tensor:
    """Average a module's input over positions.

    Args:
        module: whose input it is: linear layers and layer norms have channels last.
        features: (N, C), (N, C, ...) or, for those, (N, ..., C).

    Returns:
        (N, C).
    """
    if features.dim() == 2:
        return features
    if isinstance(module, _CHANNELS_LAST):
        return features.flatten(1, -2).mean(1)
    return features.flatten(2).mean(2)


@torch.no_grad()
def penultimate_layer(model: nn.Module, card: Card) -> str:
    """Return the name of the last linear layer that a forward pass calls.

    Raises:
        DreamkitError: there is none.
    """
    called: list[str] = []
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    with eval_mode(model), hooked(linear, lambda name, module, x: called.append(name)):
        model(torch.zeros(1, *card.input_size, device=device_of(model)))
    if not called:
        raise DreamkitError(
            f"{card.name} calls no linear layer, so it has no penultimate one: name the module "
            "whose input is to be compared",
            ("layer",),
        )
    return called[-1]


def find_layer(model: nn.Module, card: Card, layer: str | None) -> tuple[str, nn.Module]:
    """Return a module with its name; None stands for the penultimate layer.

    Raises:
        DreamkitError: the model has no such module.
    """
    name = penultimate_layer(model, card) if layer is None else layer
    modules = {known: module for known, module in model.named_modules() if known}
    if name not in modules:
        hint = did_you_mean(name, modules)
        raise DreamkitError(f"{card.name} has no module '{name}'{hint}", ("layer",))
    return name, modules[name]
