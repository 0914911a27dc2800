"""Heads of attention, which go whole: queries, keys and values of one head are one channel."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dreamkit.pruning.channels import any_channels, distinct
from dreamkit.pruning.cut_rules import kept_number
from dreamkit.pruning.rules import Call

aten = torch.ops.aten

ATTENTION = {
    getattr(aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
}
"""What torch's scaled dot product of (N, heads, T, C) becomes, by device."""
_HEADS = re.compile(r"(?:n|num|attention|_)*heads?")
"""What modules call the number of their heads: ``num_heads``, ``num_attention_heads``."""


def make_heads(call: Call, channels: Tensor, varying: Sequence[int]) -> int | None:
    """Return the axis that a view has heads along, if it makes one inside a layer of attention.

    It is known by its size, which the module under way has under a name of heads, and by what is
    beside it: the channels of each head come last. Numbers of heads under such names are recorded.

    Args:
        call: of an operation that moves elements.
        channels: of its output.
        varying: axes along which there are different channels.
    """
    if len(varying) < 2:
        return None
    counts = _counts(call)
    axis = next((dim for dim in reversed(varying[:-1]) if channels.shape[dim] in counts), None)
    if axis is not None:
        for dim in varying:
            if dim != axis:
                call.trace.couple_along(channels, dim)
        kept_number(call, channels, axis, channels.shape[axis], _HEADS.fullmatch)
        call.trace.heads.update(call.along(channels, axis))
    return axis


def hold_width(call: Call, channels: Tensor) -> None:
    """Record the width of all heads together, which a view puts them side by side with."""
    varying = call.trace.varying(channels)
    if len(varying) == 1 and _counts(call) and _of_heads(call, channels):
        (dim,) = varying
        if channels.shape[dim] not in _counts(call):
            kept_number(call, channels, dim, channels.shape[dim])


def refuse_mixing(call: Call, dims: Sequence[int]) -> bool:
    """Rule out heads that a softmax or a mean mixes: it is not attention that has them.

    Args:
        call: of an operation over axes of its first argument.
        dims: these axes.
    """
    channels: Tensor = call.args[0]
    mixed = {dim % channels.dim() for dim in dims} & set(call.trace.varying(channels))
    if not mixed or not _of_heads(call, channels):
        return False
    call.fix(channels, f"they are mixed by {call.target.overloadpacket}")
    return True


def _of_heads(call: Call, channels: Tensor) -> bool:
    """Whether channels are heads, all of them."""
    if not call.trace.heads:  # most networks have none, and this is asked of every mean
        return False
    heads = {call.trace.find(label) for label in call.trace.heads}
    found = distinct(channels)[0].unique().tolist()
    return all(call.trace.find(label) in heads for label in found)


def refuse_biases(call: Call) -> bool:
    """Rule out heads that meet a bias of each; mostly it comes of a table, which no layer has."""
    counts = _counts(call) - {1}
    for met in call.channels if counts else ():
        if met.dim() > 2 and met.shape[-3] in counts and not any_channels(met):
            for channels in call.channels:
                call.fix(channels, "each head has a bias of its own")
            return True
    return False


def _counts(call: Call) -> set[int]:
    """Return the numbers of heads that the module under way has; none outside attention."""
    numbers = {} if call.caller is None else vars(call.caller[1])
    return {v for key, v in numbers.items() if type(v) is int and _HEADS.fullmatch(key)}


def attend(call: Call) -> list[Tensor] | None:
    """Follow attention, which mixes what is within a head, and nothing else."""
    if refuse_biases(call):
        return None
    together = _same(call, call.args[:3], 1)
    return None if together is None else [call.spread(together, 1)]


def multiply(call: Call) -> Tensor | None:
    """Follow products of several matrices at once, of which there may be one for each head."""
    together = _same(call, call.args[:2], 0)
    return None if together is None else call.spread(together, 0)


def _same(call: Call, given: Sequence[Tensor], dim: int) -> list[int] | None:
    """Let what is given go together along an axis; None where it has channels along others."""
    if 1 in _counts(call):  # one head, which is one channel
        for channels in given:
            for axis in call.trace.varying(channels):
                call.trace.couple_along(channels, axis)
    if any(set(call.trace.varying(channels)) - {dim} for channels in given):
        for channels in call.channels:
            call.fix(channels, f"they go through {call.target.overloadpacket}")
        return None
    first, *others = (call.along(channels, dim) for channels in given)
    for other in others:
        call.trace.couple(first, other)
    return [max(labels) for labels in zip(first, *others, strict=True)]
