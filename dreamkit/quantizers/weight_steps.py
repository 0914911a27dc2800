"""Steps of weights of few bits: by the least error, not by the largest weight.

With 16 integers a step that reaches the largest weight of a channel leaves few for all others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dreamkit.onnx_int8 import Numbers, WeightSteps
from dreamkit.quantizers.float_graph import FloatGraph, Layer
from dreamkit.quantizers.ranges import LEVELS, Range

_TIGHTEST, _CUTS = 0.3, 71
"""Steps that are tried: from this share of the one that cuts nothing to that one, evenly."""
_POWER = 3.0
"""Of the error that is least: 2 cuts more off, and the outputs of some networks are the noisier."""
_ROOM = 0.9 * 2**31
"""The largest integer of a bias, with some room."""


def weight_steps(
    graph: FloatGraph, numbers: Numbers, per_channel: bool, ranges: Mapping[str, Range]
) -> dict[str, WeightSteps]:
    """Return the steps of least error of every layer's weights, by tensor.

    A bias is an integer times the steps of weights and of what goes in. So that it fits into 32
    bits, a channel of hardly any weight has a larger step: ONNX Runtime's tools see to that for
    weights of 8 bits alone.

    Args:
        graph: in float.
        numbers: with the limits of a weight's integers.
        per_channel: a step for each output channel, not one for all.
        ranges: of what goes into layers, by tensor.
    """
    found = {}
    for layer in graph.layers:
        weight, axis = graph.constant(layer.weight), _output_axis(graph, layer)
        rows = weight.transpose(0, axis).flatten(1) if per_channel else weight.flatten()[None]
        steps = least_error_steps(rows, *numbers.weight_limits)
        low, high = ranges[layer.input]
        if layer.bias is not None and high > low:
            least = graph.constant(layer.bias).abs() * LEVELS / (high - low) / _ROOM
            each = least.shape == steps.shape  # not so of one step, or of groups that share theirs
            steps = torch.maximum(steps, least if each else least.amax())
        found[layer.weight] = WeightSteps(steps, axis if per_channel else None)
    return found


def least_error_steps(rows: Tensor, low: int, high: int) -> Tensor:
    """Return for each row (G, N) the step (G,) with which integers make the least error.

    The error is the sum of abs(q(w) - w)^3, where q rounds to the nearest integer times the step
    and cuts. A row of zeros has a step of 1.

    Args:
        rows: values that share a step.
        low: the smallest integer.
        high: the largest integer.
    """
    largest = rows.abs().amax(1)
    whole = torch.where(largest > 0, largest / high, torch.ones_like(largest))
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in torch.linspace(1, _TIGHTEST, _CUTS):
        step = (share * whole)[:, None]
        kept = (rows / step).round().clamp(low, high) * step
        error = ((kept - rows).abs() ** _POWER).sum(1)
        best = torch.where(error < least, step[:, 0], best)
        least = torch.minimum(error, least)
    return best


def _output_axis(graph: FloatGraph, layer: Layer) -> int:
    """Return which axis of a layer's weights is of its output channels, as ONNX Runtime has it."""
    if layer.op_type == "Gemm":
        return 0 if graph.attributes(layer).get("transB") else 1
    return 0 if layer.op_type == "Conv" else 1
