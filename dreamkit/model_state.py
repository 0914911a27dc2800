"""Borrowing a caller's model and giving it back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; every submodule's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and keep gradients from its weights; both are restored."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter, required in gradients:
            parameter.requires_grad_(required)
