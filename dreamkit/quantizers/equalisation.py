"""Cross-layer equalisation: channels between two layers get ranges alike, and outputs stay.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019),
section 4.1: relu(s x) = s relu(x) for s > 0, so a channel may be divided by s where one layer makes
it, and the next layer's weights for it multiplied by s. Eq. 11: s = sqrt(r1 / r2), with r1 and r2
the ranges of the channel's weights in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.quantizers.float_graph import FloatGraph, Layer

_HOMOGENEOUS = {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"}
"""Operators for which f(s x) = s f(x), channel by channel."""
_PASSES = 20
"""Over all pairs, at the most: a layer in the middle of three belongs to two."""
_SETTLED = 1.001
"""Factor below which a pass changed nothing."""
_SMALLEST = 1 / 16
"""Share of the largest range that a smaller one is taken for: it may be larger on other images.

And the share of its bias that a filter's range is at the least.
"""


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between that minds how a channel is scaled.

    Args:
        first: the layer that makes the channels.
        second: the only one that reads them.
    """

    first: Layer
    second: Layer


class ChannelRanges:
    """The largest absolute value of every channel between the layers of pairs.

    Args:
        pairs: the tensors are seen as the second layer is given them.
    """

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self.tensors = tuple(pair.second.input for pair in pairs)
        self.ranges: dict[str, Tensor] = {}

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Take in a batch."""
        for name in self.tensors:
            largest = values[name].abs().transpose(0, 1).flatten(1).amax(1)
            before = self.ranges.get(name, torch.zeros_like(largest))
            self.ranges[name] = torch.maximum(before, largest)


def pairs_of(graph: FloatGraph) -> tuple[Pair, ...]:
    """Return the pairs of layers that can be equalised, in forward order.

    A layer that shares its weights with another is in none.
    """
    readers: dict[str, list[tuple[str, str, str]]] = {}
    for node in graph.proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append((node.name, node.op_type, node.output[0]))
    own = {
        layer.node: layer
        for layer in graph.layers
        if layer.op_type in {"Conv", "Gemm"}
        and all(len(readers[name]) == 1 for name in (layer.weight, layer.bias) if name)
    }
    outputs = {value.name for value in graph.proto.graph.output}
    found = []
    for first in own.values():
        tensor = first.output
        while tensor not in outputs and len(readers.get(tensor, ())) == 1:
            ((node, operator, output),) = readers[tensor]
            if node in own and own[node].input == tensor:
                found.append(Pair(first, own[node]))
            if operator not in _HOMOGENEOUS:
                break
            tensor = output
    return tuple(found)


def equalise_weights(graph: FloatGraph, pairs: tuple[Pair, ...]) -> None:
    """Make the ranges of both layers' weights alike in every channel of every pair (eq. 11).

    Args:
        graph: its weights are changed; its outputs are not, but for rounding.
        pairs: of it.
    """
    for _ in range(_PASSES):
        largest = 1.0
        for pair in pairs:
            first = _weights(graph, pair.first).abs().amax((2, 3)).flatten()
            second = _weights(graph, pair.second).abs().amax((1, 3)).flatten()
            if (bias := pair.first.bias) is not None:
                # A dead filter's bias would else be enlarged without end, and with it the one
                # range that all channels between the layers share.
                first = torch.maximum(first, graph.constant(bias).abs() * _SMALLEST)
            scale = _usable((first / second).sqrt())
            _divide(graph, pair, scale)
            largest = max(largest, float(scale.max()), float(1 / scale.min()))
        if largest < _SETTLED:
            break


def equalise_activations(
    graph: FloatGraph, pairs: tuple[Pair, ...], channels: Mapping[str, Tensor]
) -> None:
    """Make the ranges of the channels between layers alike, as far as the next layer's weights do.

    For weights with a scale for each output channel. What the first layer's scale was is then of no
    account: the tensor between has one scale for all, and its channels' ranges stand for r1. Where
    each output channel of the second layer reads one input channel, r2 is of no account either.

    Args:
        graph: its weights are changed; its outputs are not, but for rounding.
        pairs: of it.
        channels: ranges (C,) of each tensor that a second layer is given.
    """
    for pair in pairs:
        first = channels[pair.second.input]
        first = first.clamp(min=float(first.max()) * _SMALLEST)
        weights = _weights(graph, pair.second)
        if weights.shape[2] == 1:
            scale = first
        else:
            shares = weights.abs() / weights.abs().amax((2, 3), keepdim=True)
            second = shares.nan_to_num().amax((1, 3)).flatten()
            scale = (first / second).sqrt()
        _divide(graph, pair, _usable(scale))


def _usable(scale: Tensor) -> Tensor:
    """Return 1 in place of scales that nothing can be divided or multiplied by."""
    return torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))


def _divide(graph: FloatGraph, pair: Pair, scale: Tensor) -> None:
    """Divide the channels (C,) between two layers by a scale."""
    first, second = _weights(graph, pair.first), _weights(graph, pair.second)
    _replace_weights(graph, pair.first, first / scale.view(*first.shape[:2], 1, 1))
    if pair.first.bias is not None:
        graph.replace_constant(pair.first.bias, graph.constant(pair.first.bias) / scale)
    by_input = scale.view(len(second), 1, second.shape[2], 1)
    _replace_weights(graph, pair.second, second * by_input)


def _weights(graph: FloatGraph, layer: Layer) -> Tensor:
    """Return a layer's weights as (groups, outputs, inputs of a group, positions)."""
    weight, attributes = graph.constant(layer.weight), graph.attributes(layer)
    if layer.op_type == "Gemm":
        return (weight if attributes.get("transB") else weight.T)[None, :, :, None]
    groups = attributes.get("group", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _replace_weights(graph: FloatGraph, layer: Layer, weights: Tensor) -> None:
    """Give a layer weights of the shape that ``_weights`` returns."""
    if layer.op_type == "Gemm" and not graph.attributes(layer).get("transB"):
        weights = weights.transpose(1, 2)
    graph.replace_constant(layer.weight, weights.reshape(graph.constant(layer.weight).shape))
