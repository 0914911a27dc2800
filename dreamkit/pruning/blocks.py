"""Residual blocks of a network: finding them, and letting what they are given through as it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import ArtifactError
from dreamkit.graph_edges import Edge, edge
from dreamkit.model_state import eval_mode
from dreamkit.pruning.activations import weighted_layers

_SUM = "AddBackward0"
_LET_THROUGH = (
    _SUM,
    "ReluBackward0",
    "HardtanhBackward0",
    "ViewBackward0",
    "ReshapeAliasBackward0",
    "UnsafeViewBackward0",
    "CloneBackward0",
    "AliasBackward0",
    "PermuteBackward0",
    "TransposeBackward0",
)
"""Steps on the way of what is let through: sums, what cuts them off, and other views of them."""


class Bypass(nn.Module):
    """Stands where a residual block was: puts out the first of what it is given."""

    def forward(self, x: Any, *others: Any, **named: Any) -> Any:
        """Return x."""
        return x


def bypass(model: nn.Module, names: Iterable[str]) -> None:
    """Put a ``Bypass`` in the place of some blocks, in place.

    Raises:
        ArtifactError: the model has no such module.
    """
    for name in names:
        owner, _, key = name.rpartition(".")
        try:
            model.get_submodule(name)
            setattr(model.get_submodule(owner), key, Bypass())
        except AttributeError as error:
            raise ArtifactError(f"the builder's model has no block '{name}'") from error


@contextlib.contextmanager
def bypassed(model: nn.Module, name: str) -> Iterator[None]:
    """Let a block's input through for as long as the context lasts."""
    block = model.get_submodule(name)
    owner, _, key = name.rpartition(".")
    holder = model.get_submodule(owner)
    setattr(holder, key, Bypass())
    try:
        yield
    finally:
        setattr(holder, key, block)


def residual_blocks(model: nn.Module, images: Tensor) -> list[str]:
    """Return the modules that put out what they are given plus something, in forward order.

    Without such a block a network still runs, and "behaves like an ensemble of shallower ones"
    (Veit et al., NeurIPS 2016). They are told by what the network computes, not by their class: a
    way leads from a module's output back to its first input over sums, ReLUs and views alone. Both
    have one shape, a convolution or linear layer lies in between, and the module is called once. Of
    such modules in one another (a stage is a sum of its blocks) the innermost are meant.

    Args:
        model: with a graph from its images to its outputs; it is run in eval mode and comes back
            as it was.
        images: normalised, (N, C, H, W), on the model's device.
    """
    given: dict[str, tuple[Edge, torch.Size]] = {}
    found: dict[str, None] = {}
    calls: Counter[str] = Counter()
    weighted = [name for name, _ in weighted_layers(model)]
    blocks = {
        name: module
        for name, module in model.named_modules()
        if name
        and any(layer.startswith(f"{name}.") for layer in weighted)
        and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    }

    def enter(name: str, inputs: tuple[Any, ...]) -> None:
        calls[name] += 1
        place = edge(inputs[0]) if inputs else None
        if place is not None:
            given[name] = place, inputs[0].shape

    def leave(name: str, output: Any) -> None:
        place = edge(output)
        if name in given and place is not None:
            start, shape = given[name]
            if output.shape == shape and _sums_up(start, place):
                found[name] = None

    with ExitStack() as stack, torch.enable_grad(), eval_mode(model):
        for name, module in blocks.items():
            before = module.register_forward_pre_hook(lambda m, x, name=name: enter(name, x))
            after = module.register_forward_hook(lambda m, x, y, name=name: leave(name, y))
            stack.callback(before.remove)
            stack.callback(after.remove)
        start = images.clone().requires_grad_(True)
        model(start.clone())  # what is no leaf may be changed in place
    once = [name for name in found if calls[name] == 1]
    return [name for name in once if not any(other.startswith(f"{name}.") for other in once)]


def _sums_up(start: Edge, end: Edge) -> bool:
    """Whether a tensor is another plus something: a way back over sums and what keeps them."""
    ways, seen = [(end, False)], set()
    while ways:
        way = place, summed = ways.pop()
        if place == start:
            if summed:
                return True
            continue
        step = place[0].name()
        if way in seen or step not in _LET_THROUGH:
            continue
        seen.add(way)
        summed = summed or step == _SUM
        ways += [((before, nr), summed) for before, nr in place[0].next_functions if before]
    return False
