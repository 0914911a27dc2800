"""Rules of PyTorch's operations: what moves channels, mixes them, or leaves them where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from dreamkit.pruning.attention_rules import (
    ATTENTION,
    attend,
    hold_width,
    make_heads,
    multiply,
    refuse_biases,
    refuse_mixing,
)
from dreamkit.pruning.channels import NONE, any_channels, distinct
from dreamkit.pruning.cut_rules import check_cuts
from dreamkit.pruning.rules import Call

aten = torch.ops.aten

_MOVING = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze),
    *(aten.squeeze, aten.permute, aten.transpose, aten.t, aten.expand, aten.slice, aten.select),
    *(aten.split, aten.split_with_sizes, aten.unbind, aten.cat, aten.stack, aten.clone),
    *(aten.contiguous, aten.alias, aten.detach, aten.flip, aten.roll),
    *(aten.constant_pad_nd, aten.pixel_shuffle, aten.pixel_unshuffle, aten.repeat),
    *(aten.channel_shuffle, aten.native_channel_shuffle, aten.movedim),
}
_REDUCING = {aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std}
_POOLING = {
    *(aten.avg_pool2d, aten.max_pool2d_with_indices, aten._adaptive_avg_pool2d),
    *(aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d),
    *(aten.reflection_pad2d, aten.replication_pad2d, aten.avg_pool1d, aten.upsample_nearest1d),
}
_SOFTMAX = {aten._softmax, aten._safe_softmax, aten._log_softmax}
_IN_PLACE_OF_EACH = {
    *_SOFTMAX,
    *(aten.native_dropout, aten._to_copy, aten.copy_),
    *(aten.hardswish, aten.hardswish_, aten.mish, aten.mish_, aten.relu6, aten.relu6_),
    aten.as_strided_,  # of a pooled map, to change its layout
    *(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like),
}
"""Operations that leave every element where it is, though PyTorch does not tag them so."""


def follow_operation(call: Call) -> Tensor | Sequence[Tensor | None] | None:
    """Return the channels of an operation's outputs; what cannot be followed is ruled out."""
    operation = call.target.overloadpacket
    if operation in _MOVING:
        return _move(call)
    if operation in _POOLING:
        return call.spread(call.trace.along(call.args[0], 1, str(operation)), 1)
    if operation in ATTENTION:
        return attend(call)
    if operation is aten.bmm:
        return multiply(call)
    if operation in _REDUCING and isinstance(call.output, Tensor):
        return _reduce(call)
    if operation in _IN_PLACE_OF_EACH or _is_pointwise(call.target):
        return _meet(call)
    for channels in call.channels:
        call.fix(channels, f"they go through {operation}")
    return None


def _move(call: Call) -> list[Tensor]:
    """Follow an operation that moves elements: it moves their channels the same way."""
    first = call.args[0]
    if isinstance(first, Tensor):
        check_cuts(call, first)
    if call.target.overloadpacket is aten.constant_pad_nd:  # what is put there is no channel's
        call = replace(call, args=call.args[:2], kwargs={})
    moved: list[Tensor] = tree_flatten(call.repeat())[0]
    if isinstance(first, Tensor) and len(call.trace.varying(first)) == 1:
        for channels in moved:
            # Views that put channels side by side: (groups, channels), say. The groups stay as
            # many, so what goes of one goes of all. Heads of attention go whole.
            varying = call.trace.varying(channels)
            if make_heads(call, channels, varying) is None:
                for dim in varying[:-1]:
                    call.trace.couple_along(channels, dim)
            hold_width(call, channels)
    return moved


def _reduce(call: Call) -> Tensor | None:
    """Follow a mean or a sum: over positions channels stay, over channels they are gone."""
    channels: Tensor = call.args[0]
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(channels.dim()))
    dims = [dim % channels.dim() for dim in dims]
    varying = set(call.trace.varying(channels))
    mixed = sorted(varying & set(dims))
    if refuse_mixing(call, mixed) or (mixed and varying <= set(dims)):
        return None
    for dim in mixed:  # channels of several that are added up, as of stacked branches
        call.trace.couple_along(channels, dim)
    left = distinct(channels)[0].amax(dims, keepdim=call.output.dim() == channels.dim())
    return left.expand(call.output.shape)


def _meet(call: Call) -> Tensor | None:
    """Follow an operation element by element: sums, products, activations."""
    softmax = call.target.overloadpacket in _SOFTMAX
    if refuse_biases(call) or (softmax and refuse_mixing(call, [call.args[1]])):
        return None
    found = tree_flatten(call.output)[0]
    output = found[0] if found and isinstance(found[0], Tensor) else None
    together: Tensor | None = None
    for channels in call.channels:
        if not any_channels(channels):
            continue
        if output is None or not _broadcasts(channels.shape, output.shape):
            call.fix(channels, f"they go through {call.target.overloadpacket}")
            continue
        channels = channels.expand(output.shape)
        if together is None:
            together = channels
            continue
        if _partial(call, channels) or _partial(call, together):
            for met in (channels, together):
                call.fix(met, "some of them meet constants where others meet channels")
        call.trace.couple_tensors(together, channels)
        before, now = distinct(together, channels)
        together = torch.where(before == NONE, now, before).expand(output.shape)
    return together


def _partial(call: Call, channels: Tensor) -> bool:
    """Whether an axis has channels in some places and none in others."""
    for dim in call.trace.varying(channels):
        (few,) = distinct(channels)
        if bool((few.movedim(dim, 0).reshape(few.shape[dim], -1).amax(1) == NONE).any()):
            return True
    return False


def _is_pointwise(func: Any) -> bool:
    """Whether PyTorch tags an operation, or what it does in place, as one element by element."""
    if torch.Tag.pointwise in func.tags:
        return True
    base = getattr(aten, func.overloadpacket.__name__.removesuffix("_"), None)
    if base is None or func._overloadname not in base.overloads():
        return False
    return torch.Tag.pointwise in getattr(base, func._overloadname).tags


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return all(own in (1, other) for own, other in pairs)
