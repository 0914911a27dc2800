"""Copying networks, whatever computes their weights."""

from __future__ import annotations

import copy
import io
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy of a model.

    ``weight_norm``, ``spectral_norm`` and ``torch.nn.utils.prune`` leave the weights that they
    compute before each pass as attributes, which cannot be copied while they know how they were
    computed. Their copies are plain values until the copy's first pass.

    Raises:
        Exception: whatever a module's own attributes raise that cannot be copied.
    """
    computed = [
        (module, name, value)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    # TorchScript's own copies have weights that remember what they were copied from.
    whole = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    scripted = {id(module): _reloaded(module) for module in whole}
    try:
        for module, name, value in computed:
            vars(module)[name] = value.detach()
        return copy.deepcopy(model, scripted)
    finally:
        for module, name, value in computed:
            vars(module)[name] = value


def _reloaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return a TorchScript module as it comes back from a file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to be superseded by torch.export
        torch.jit.save(module, file)
        file.seek(0)
        loaded: torch.jit.ScriptModule = torch.jit.load(file)
    loaded.train(module.training)
    return loaded
