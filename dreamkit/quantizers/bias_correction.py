"""Bias correction: what rounding weights does to the mean of a layer's outputs is taken back.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019),
section 4.2, in its empirical form: E[y~] - E[y] = (W~ - W) E[x], with E[x] over calibration images.
A layer is linear, so the mean of its outputs is its output for the mean input, padding and all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamkit.quantizers.float_graph import FloatGraph, Layer

_CORRECTED = {"Conv", "Gemm"}


class MeanInputs:
    """The mean over images of what goes into layers.

    Args:
        layers: whose inputs are seen.
    """

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.tensors = tuple(dict.fromkeys(layer.input for layer in layers))
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Take in a batch."""
        self._images += len(values[self.tensors[0]]) if self.tensors else 0
        for name in self.tensors:
            total = values[name].double().sum(0)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def means(self) -> dict[str, Tensor]:
        """Return the mean input (C, H, W) or (C,) of every layer, by its tensor."""
        return {name: (total / self._images).float() for name, total in self._sums.items()}


def corrected(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return those layers whose outputs have a bias for each channel to correct."""
    return tuple(layer for layer in layers if layer.op_type in _CORRECTED)


def corrections(
    graph: FloatGraph, means: Mapping[str, Tensor], rounded: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is to be added to the biases (C,) of every layer, by its node.

    Args:
        graph: in float.
        means: of the inputs of layers, as ``MeanInputs`` has them.
        rounded: the weights that layers have as integers, times their scale, by tensor; a layer
            without any is left out.
    """
    found = {}
    for layer in corrected(graph.layers):
        # Padding that depends on the input's size is not gone into.
        padded = graph.attributes(layer).get("auto_pad", b"NOTSET")
        if layer.weight in rounded and padded in {b"NOTSET", b"VALID"}:
            error = rounded[layer.weight] - graph.constant(layer.weight)
            found[layer.node] = -_mean_output(graph, layer, means[layer.input], error)
    return found


def _mean_output(graph: FloatGraph, layer: Layer, mean: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of each output channel (C,) of a layer with other weights and no bias."""
    attributes = graph.attributes(layer)
    if layer.op_type == "Gemm":
        return mean @ (weight.T if attributes.get("transB") else weight)
    dims = weight.dim() - 2
    pads = attributes.get("pads", [0] * 2 * dims)
    # ONNX has all beginnings and then all ends, torch the last axis first.
    around = [side for axis in reversed(range(dims)) for side in (pads[axis], pads[axis + dims])]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    out = convolve(
        F.pad(mean[None], around),
        weight,
        stride=tuple(attributes.get("strides", [1] * dims)),
        dilation=tuple(attributes.get("dilations", [1] * dims)),
        groups=attributes.get("group", 1),
    )
    return torch.as_tensor(out[0].flatten(1).mean(1))
