"""A network in ONNX and the ranges of its activations, to be written in integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamkit.errors import import_extra
from dreamkit.onnx_int8 import Numbers, WeightSteps, computed_in_float, in_integers
from dreamkit.onnx_model import INPUT, OPSET, OUTPUT, OnnxSession
from dreamkit.quantizers.float_graph import FloatGraph
from dreamkit.quantizers.float_layers import put_back
from dreamkit.quantizers.ranges import Range
from dreamkit.quantizers.signal_to_noise import read_back, signal_to_noise
from dreamkit.quantizers.simulation import SimulatedNetwork
from dreamkit.quantizers.watching import WATCHED, values_of
from dreamkit.quantizers.weight_steps import weight_steps
from dreamkit.types import FileLook, Quantization


@dataclass(frozen=True)
class OnnxQuantization(Quantization):
    """A network in ONNX with the ranges of its activations.

    Args:
        numbers: how weights and activations are written.
        per_channel: a scale for each output channel of the weights.
        graph: in float.
        ranges: of its tensors.
        shifts: to be added to the biases of layers in integers, by node.
        folder: for files of the work.
        told: what its description says besides.
    """

    numbers: Numbers
    per_channel: bool
    graph: FloatGraph
    ranges: Mapping[str, Range]
    shifts: Mapping[str, Tensor]
    folder: Path
    told: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers with weights, in forward order."""
        return tuple(dict.fromkeys(layer.name for layer in self.graph.layers))

    def write(self, path: Path, keep_float: Collection[str] = ()) -> None:
        """Write the file in integers."""
        path.write_bytes(self.proto(keep_float).SerializeToString())

    def write_float(self, path: Path) -> None:
        """Write the network in float."""
        path.write_bytes(self.graph.serialised())

    def session(self) -> OnnxSession:
        """Return what runs it in integers, without saturation."""
        return OnnxSession(self.proto().SerializeToString(), None, torch.zeros(()), exact=True)

    def proto(self, keep_float: Collection[str] = ()) -> Any:
        """Return the network in integers, a ``ModelProto``."""
        made = import_extra("onnx", "onnx").ModelProto()
        made.CopyFrom(self._in_integers)
        put_back(made, self.graph, [ly for ly in self.graph.layers if ly.name in keep_float])
        return made

    @cached_property
    def _in_integers(self) -> Any:
        """The network with every layer in integers."""
        graph = FloatGraph(self.graph.serialised())
        for layer in self.graph.layers:
            if layer.node in self.shifts:
                graph.shift_bias(layer, self.shifts[layer.node])
        numbers, image, steps = self.numbers, graph.black_image(), dict[str, WeightSteps]()
        if numbers.weight_bits == 4:
            steps = weight_steps(graph, numbers, self.per_channel, self.ranges)
        return in_integers(
            graph.proto, numbers, self.per_channel, image, self.ranges, self.folder, steps
        )

    def simulated(self, keep_float: Collection[str] = ()) -> SimulatedNetwork:
        """Return what the file computes as a network that can be trained."""
        weights = {f"{ly.weight}_quantized": ly.weight for ly in self.graph.layers}
        return SimulatedNetwork(
            self.proto(keep_float),
            {integers: self.graph.constant(name) for integers, name in weights.items()},
            self.numbers.weight_limits,
            self,
        )

    def rounded_weights(self) -> dict[str, Tensor]:
        """Return the weights that the file in integers has, times their scales, by tensor."""
        made = self.proto()
        pairs = read_back(made)
        there = {name for node in made.graph.node for name in node.output}
        names = {}
        for layer in self.graph.layers:
            name = pairs.get(layer.weight, f"{layer.weight}_DequantizeLinear_Output")
            if name in there:
                names[layer.weight] = name
        (found,) = values_of(made, list(names.values()), [self.graph.black_image()])
        return {weight: found[name] for weight, name in names.items()}

    def look(self, path: Path, images: Tensor) -> FileLook:
        """Return how much noise integers make of every layer, and what stayed in float."""
        onnx = import_extra("onnx", "onnx")
        made = onnx.load_model(path)
        after = read_back(made)
        # A layer is compared behind the operator that cuts its output, which is joined with it.
        names = {layer.name: self.graph.cut_output(layer) for layer in self.graph.layers}
        noise = signal_to_noise(
            self.graph.proto,
            made,
            {n: after.get(n, n) for n in names.values()},
            images.split(WATCHED),
        )
        return FileLook(
            {layer: noise[name] for layer, name in names.items()}, computed_in_float(path)
        )

    def describe(self) -> dict[str, Any]:
        """Return what the file's JSON says of it."""
        each = "channel" if self.per_channel else "tensor"
        bits = self.numbers.weight_bits
        return {
            "backend": "onnxruntime",
            "version": import_extra("onnxruntime", "onnx").__version__,
            "format": "QDQ",
            "opset": OPSET,
            "input": INPUT,
            "output": OUTPUT,
            "weights": f"int{4 if bits == 4 else 8}, {bits} bits, symmetric, per {each}",
            "activations": "int8" if self.numbers.signed_activations else "uint8",
            **self.told,
            "ranges": {name: list(self.ranges[name]) for name in self.graph.ranged},
        }
