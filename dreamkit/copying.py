"""Copying networks, whatever computes their weights."""

from __future__ import annotations

import copy
import io
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy of a model.

    ``weight_norm``, ``spectral_norm`` and ``torch.nn.utils.prune`` leave the weights that they
    compute before each pass as attributes, and others keep activations, in lists too. They cannot
    be copied while they know how they were computed: their copies are plain values until the
    copy's first pass.

    Raises:
        Exception: whatever a module's own attributes raise that cannot be copied.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            # TorchScript's own copies have weights that remember what they were copied from.
            known[id(module)] = _reloaded(module)
        else:
            for tensor in _computed_in(vars(module), set()):
                known[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, known)


def _computed_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers that remember how they were computed."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple | set | deque) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _computed_in(part, seen)


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
