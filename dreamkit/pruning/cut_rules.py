"""Code that cuts an activation at some channel: it may have the number, and so may its module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dreamkit.pruning.rules import Call

aten = torch.ops.aten


def check_cuts(call: Call, channels: Tensor) -> None:
    """Look at slices, splits, picks and padding along channels.

    Args:
        call: of an operation that moves elements.
        channels: of its first argument.
    """
    operation, varying = call.target.overloadpacket, call.trace.varying(channels)
    if operation is aten.constant_pad_nd:
        padded = {channels.dim() - 1 - i // 2 for i, n in enumerate(call.args[1]) if n}
        if padded & set(varying):
            reason = "its channels meet others beside padded zeros, which shift them"
            call.fix(channels, reason)
    elif operation in (aten.slice, aten.select):
        dim = call.argument(1, "dim", 0) % channels.dim()
        if dim in varying and operation is aten.select:
            picked = channels.narrow(dim, 0, call.args[2] % channels.shape[dim] + 1)
            call.fix(picked, "one of them is picked by number")
        elif dim in varying:
            _check_slice(call, channels, dim)
    elif operation in (aten.split, aten.split_with_sizes):
        dim = call.argument(2, "dim", 0) % channels.dim()
        if dim in varying:
            _check_split(call, channels, dim, call.args[1])


def _check_slice(call: Call, channels: Tensor, dim: int) -> None:
    size = channels.shape[dim]
    start, end = call.argument(2, "start", 0) or 0, call.argument(3, "end")
    if call.argument(4, "step", 1) != 1:
        call.fix(channels, "the code takes every few of them")
    for cut in (start, size if end is None else end):
        place = cut + size if cut < 0 else cut
        if 0 < place < size:
            _note_cut(call, channels, dim, place)
            held = kept_number(call, channels, dim, place)
            call.trace.slices.append((call.trace.along(channels, dim, "a cut"), held))


def _check_split(call: Call, channels: Tensor, dim: int, parts: int | Sequence[int]) -> None:
    size = channels.shape[dim]
    if isinstance(parts, int):
        parts = [parts] * (size // parts) + ([size % parts] if size % parts else [])
    if len(set(parts)) > 1:
        call.fix(channels, "the code splits them into unequal parts")
        return
    _note_cut(call, channels, dim, parts[0])
    call.trace.couple_along(channels, dim, parts[0])
    kept_number(call, channels, dim, parts[0])
    kept_number(call, channels, dim, size)


def _note_cut(call: Call, channels: Tensor, dim: int, place: int) -> None:
    """Remember which channels come before a cut, to see whether they still do without some."""
    call.trace.cuts.append(call.trace.along(channels, dim, "a cut")[:place])


def kept_number(
    call: Call,
    channels: Tensor,
    dim: int,
    count: int,
    named: Callable[[str], object] = lambda key: True,
) -> list[tuple[str, str]]:
    """Record attributes of the module under way that hold a number of channels.

    Whether they are what the code cuts at is seen when the model runs without some.

    Args:
        call: in the module.
        channels: some that go through the call.
        dim: their axis.
        count: the number, of those that come first along it.
        named: whether an attribute of a name may be one.
    """
    assert call.caller is not None
    name, module = call.caller
    along = call.trace.along(channels, dim, name)[:count]
    held = [(name, f"attribute:{key}") for key in _attributes(module, count) if named(key)]
    for _, axis in held:
        call.trace.record(name, axis, along, sizes=(axis.partition(":")[2],))
    return held


def _attributes(module: nn.Module, count: int) -> list[str]:
    """Return the names of a module's whole numbers that are this one."""
    return [
        key
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_") and value == count > 1
    ]
