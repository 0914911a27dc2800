"""The points of a latency table: counts of channels half an octave apart, and between blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from dreamkit.types import LayerShape


def corners(shape: LayerShape, block: int) -> list[tuple[LayerShape, float]]:
    """Return the points around a shape that it is interpolated between, and the share of each.

    Args:
        shape: a layer.
        block: channels that the target computes together.
    """
    if shape.kind == "norm":
        return [
            (replace(shape, c_in=c, c_out=c), share)
            for c, share in _counts_around(shape.c_out, 1, 1)
        ]
    if shape.depthwise:
        return [
            (replace(shape, c_in=c, c_out=c, groups=c), share)
            for c, share in _counts_around(shape.c_out, 1, block)
        ]
    block = block if shape.kind == "conv" else 1
    return [
        (replace(shape, c_in=c_in, c_out=c_out), share_in * share_out)
        for c_in, share_in in _counts_around(shape.c_in, shape.groups, block)
        for c_out, share_out in _counts_around(shape.c_out, shape.groups, block)
    ]


def shapes_to_measure(
    shapes: Iterable[LayerShape], block: int, image_channels: int, least: float
) -> list[LayerShape]:
    """Return the points that serve a network and all that pruning makes of it.

    Args:
        shapes: of the network's layers.
        block: channels that the target computes together.
        image_channels: of its input, which pruning leaves alone.
        least: share of a layer's channels that pruning leaves at the least, in (0, 1].

    Returns:
        For each distinct layer, the points from ``least`` of its channels to all.
    """
    found: dict[LayerShape, None] = {}
    for shape in shapes:
        if shape.kind == "norm":
            counts = _counts_to_measure(shape.c_out, 1, 1, least)
            found |= {replace(shape, c_in=c, c_out=c): None for c in counts}
            continue
        if shape.depthwise:
            counts = _counts_to_measure(shape.c_out, 1, block, least)
            found |= {replace(shape, c_in=c, c_out=c, groups=c): None for c in counts}
            continue
        together = block if shape.kind == "conv" else 1
        inputs = _counts_to_measure(shape.c_in, shape.groups, together, least)
        if shape.c_in == image_channels:
            inputs = [shape.c_in]
        outputs = _counts_to_measure(shape.c_out, shape.groups, together, least)
        found |= {replace(shape, c_in=i, c_out=o): None for i in inputs for o in outputs}
    return list(found)


def _counts_to_measure(channels: int, multiple: int, block: int, least: float) -> list[int]:
    """Return the points that serve every count from a share of some channels to all of them."""
    lowest = max(multiple, math.ceil(least * channels / multiple) * multiple)
    counts = range(lowest, channels + 1, multiple)
    return sorted(
        {point for count in counts for point, _ in _counts_around(count, multiple, block)}
    )


def _half_octave(number: int) -> int:
    """Return how far apart the points 1, 2, 3, 4, 6, 8, 12, ... are from a number on."""
    return max(1 << math.floor(math.log2(number)) >> 1, 1)


def _half_octaves(number: int) -> list[tuple[int, float]]:
    """Return the points 1, 2, 3, 4, 6, 8, 12, ... around a number, and the share of each in it."""
    step = _half_octave(number)
    low = number // step * step
    share = (number - low) / step
    return [(low, 1 - share), (low + step, share)] if share else [(low, 1.0)]


def _counts_around(channels: int, multiple: int, block: int) -> list[tuple[int, float]]:
    """Return the measured channel counts around one, and the share of each in its latency.

    Args:
        channels: the count.
        multiple: the layer's groups; counts are multiples of it.
        block: channels that the target computes together.
    """
    if multiple > 1:
        return [(point * multiple, share) for point, share in _half_octaves(channels // multiple)]
    blocks, rest = divmod(channels, block)
    if not rest:
        return [(point * block, share) for point, share in _half_octaves(blocks)]
    if not blocks:
        low = _half_octaves(channels)[0][0]
        high = min(low + _half_octave(low), block - 1)  # a whole block is of the other class
        share = (channels - low) / (high - low) if high > low else 0.0
        return [(point, part) for point, part in ((low, 1 - share), (high, share)) if part]
    # An odd rest: half a block is a whole one to some kernels.
    middle = max(block // 2 - 1, 1)
    return [(point * block + middle, share) for point, share in _half_octaves(blocks)]
