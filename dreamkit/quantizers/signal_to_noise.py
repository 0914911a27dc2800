"""What integers do to the outputs of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dreamkit.quantizers.watching import values_of


def read_back(model: Any) -> dict[str, str]:
    """Return, for each tensor that becomes integers, the tensor that they become again."""
    quantized, found = dict[str, str](), dict[str, str]()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            found.setdefault(quantized[node.input[0]], node.output[0])
    return found


def signal_to_noise(
    right: Any, other: Any, names: Mapping[str, str], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Return 10 log10 of E[x^2] / E[(x~ - x)^2] for tensors x, in dB: higher is better.

    Args:
        right: a ``ModelProto`` in float.
        other: the same network in integers.
        names: of tensors of ``right``, to those that stand for them in ``other``.
        batches: normalised images (N, C, H, W).
    """
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    theirs = tuple(dict.fromkeys(names.values()))
    both = zip(
        values_of(right, list(names), batches), values_of(other, theirs, batches), strict=True
    )
    for expected, found in both:
        for name, other_name in names.items():
            signal[name] += float(expected[name].double().square().sum())
            noise[name] += float((found[other_name] - expected[name]).double().square().sum())
    return {name: decibels(signal[name], noise[name]) for name in names}


def decibels(signal: float, noise: float) -> float:
    """Return a ratio of powers in dB; 999 where there is no noise."""
    return 10 * math.log10(max(signal, 1e-30) / noise) if noise > 0 else 999.0
