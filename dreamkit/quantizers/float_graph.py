"""A float network's graph in ONNX: its layers, its tensors, and what flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamkit.errors import import_extra

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FOLDED = {"Relu", "Clip"}
"""Operators that only cut what they are given: their output's range is their input's too."""


@dataclass(frozen=True)
class Layer:
    """An operator with weights.

    Args:
        name: of the module whose weights they are, as ``features.0.conv``.
        node: its name in the graph.
        op_type: ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul``.
        input: tensor that goes in.
        weight: tensor of its weights.
        bias: tensor of its biases, None without.
        output: tensor that comes out.
    """

    name: str
    node: str
    op_type: str
    input: str
    weight: str
    bias: str | None
    output: str


def _onnx() -> Any:
    # Not an attribute: a graph can be copied, and a module cannot.
    return import_extra("onnx", "onnx")


class FloatGraph:
    """A network in ONNX's format, in float.

    Args:
        model: serialised.
    """

    def __init__(self, model: bytes) -> None:
        onnx = _onnx()
        self.proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
        self._float = onnx.TensorProto.FLOAT

    def serialised(self) -> bytes:
        """Return the model as it is now."""
        found: bytes = self.proto.SerializeToString()
        return found

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The operators with weights, in the order in which they run."""
        found, known = [], {tensor.name for tensor in self.proto.graph.initializer}
        for node in self.proto.graph.node:
            if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in known:
                weight = node.input[1]
                name = weight.removesuffix(".weight") if weight.endswith(".weight") else node.name
                bias = node.input[2] if len(node.input) > 2 and node.input[2] in known else None
                data, output = node.input[0], node.output[0]
                found.append(Layer(name, node.name, node.op_type, data, weight, bias, output))
        return tuple(found)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the float tensors that depend on the images, the images first."""
        graph = self.proto.graph
        typed = {value.name: value for value in (*graph.value_info, *graph.output)}
        found = [graph.input[0].name]
        for node in graph.node:
            for name in node.output:
                value = typed.get(name)
                if value is not None and value.type.tensor_type.elem_type == self._float:
                    found.append(name)
        return tuple(found)

    @cached_property
    def ranged(self) -> tuple[str, ...]:
        """Names of the tensors that integers need a range of.

        What only goes into a ``Relu`` or a ``Clip`` is left out: it is joined with that.
        """
        users: dict[str, list[str]] = {}
        for node in self.proto.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node.op_type)
        cut = {name for name, ops in users.items() if len(ops) == 1 and ops[0] in _FOLDED}
        made = {layer.output for layer in self.layers}
        return tuple(name for name in self.tensors if name not in cut & made)

    def black_image(self) -> Tensor:
        """Return an input (1, C, H, W) of zeros."""
        dims = self.proto.graph.input[0].type.tensor_type.shape.dim
        return torch.zeros([dim.dim_value or 1 for dim in dims])

    def constant(self, name: str) -> Tensor:
        """Return a tensor that does not depend on the images, as weights do not."""
        (found,) = (t for t in self.proto.graph.initializer if t.name == name)
        return torch.from_numpy(np.array(_onnx().numpy_helper.to_array(found)))

    def replace_constant(self, name: str, value: Tensor) -> None:
        """Give a tensor that does not depend on the images other values."""
        (found,) = (t for t in self.proto.graph.initializer if t.name == name)
        found.CopyFrom(_onnx().numpy_helper.from_array(value.contiguous().numpy(), name))

    def attributes(self, layer: Layer) -> dict[str, Any]:
        """Return the attributes of a layer's operator."""
        (node,) = (node for node in self.proto.graph.node if node.name == layer.node)
        return {a.name: _onnx().helper.get_attribute_value(a) for a in node.attribute}

    def shift_bias(self, layer: Layer, shift: Tensor) -> None:
        """Add to a layer's biases (C,); one without any gets them.

        Others that had the same biases keep them.
        """
        graph, name = self.proto.graph, f"{layer.node}.bias"
        bias = shift if layer.bias is None else self.constant(layer.bias) + shift
        graph.initializer.append(_onnx().numpy_helper.from_array(bias.numpy(), name))
        (node,) = (node for node in graph.node if node.name == layer.node)
        del node.input[2:]
        node.input.append(name)
        used = {given for node in graph.node for given in node.input}
        for old in [tensor for tensor in graph.initializer if tensor.name == layer.bias]:
            if old.name not in used:
                graph.initializer.remove(old)

    def cut_output(self, layer: Layer) -> str:
        """Return a layer's output, behind the ``Relu`` or ``Clip`` that alone has it."""
        users = [node for node in self.proto.graph.node if layer.output in node.input]
        if len(users) == 1 and users[0].op_type in _FOLDED:
            name: str = users[0].output[0]
            return name
        return layer.output
