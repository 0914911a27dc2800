"""A file in integers as a network in PyTorch: it computes what the file does, and can be trained.

The integers are where the file has them. What is learned are the layers' weights and biases, and
the steps of weights and activations; zero points stay. Batch normalisation is folded already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.quantizers.lsq import LearnedStep
from dreamkit.quantizers.onnx_operators import Operator
from dreamkit.quantizers.ranges import Range
from dreamkit.types import FileLook, Quantization, Simulation

_WEIGHTED = {"Conv", "Gemm", "MatMul"}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_GIVEN = "_QuantizeLinear_Input"
"""Ending that ONNX Runtime's tools give the name of what becomes an output of the file."""
_ROOM = 0.9 * 2**31
"""The largest integer of a bias, with some room."""


class SimulatedNetwork(Simulation):
    """What a file in integers computes: normalised images (N, C, H, W) to outputs (N, K).

    Args:
        file: a ``ModelProto`` with quantize and dequantize operators.
        weights: in float, by the name of their integers; those of others are what integers say.
        limits: the smallest and the largest integer of a weight.
        untrained: the network that the file is of.

    Raises:
        DreamkitError: an operator has several outputs, which is not known here.
    """

    def __init__(
        self,
        file: Any,
        weights: Mapping[str, Tensor],
        limits: tuple[int, int],
        untrained: Quantization,
    ) -> None:
        super().__init__()
        onnx = import_extra("onnx", "onnx")
        self._file: bytes = file.SerializeToString()
        self._untrained, self._limits = untrained, limits
        self._given, self._output = file.graph.input[0].name, file.graph.output[0].name
        self._operators = tuple(_operator(node, onnx.helper) for node in file.graph.node)
        self._makers = {op.output: op for op in self._operators}
        found = {t.name: _as_tensor(onnx.numpy_helper.to_array(t)) for t in file.graph.initializer}
        self._steps = nn.ModuleList()
        self._step_of: dict[str, int] = {}
        """Of integers by the name of their scale, of a file's constant ones by their own."""
        self._learned = frozenset(self._layer_constants(found))
        self._held: dict[str, str] = {}
        self._add_steps(found)
        self._add_values(found, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs."""
        there = {self._given: images}
        for op in self._operators:
            if op.kind == _QUANTIZE:
                step = self._steps[self._step_of[op.inputs[1]]]
                there[op.output] = step(self._value(op.inputs[0], there))
            elif op.kind == _DEQUANTIZE:
                value = self._value(op.inputs[0], there)
                number = self._step_of.get(op.inputs[0])
                there[op.output] = value if number is None else self._steps[number](value)
            else:
                values = [self._value(name, there) if name else None for name in op.inputs]
                if (parts := self._integer_parts(op)) is not None:
                    values[2] = self._rounded_bias(*parts)
                there[op.output] = op.run(*values)
        return there[self._output]

    def trained(self) -> Quantization:
        """Return the network in integers as it is now."""
        onnx = import_extra("onnx", "onnx")
        file = onnx.load_model_from_string(self._file)
        new, ranges = dict[str, Tensor](), dict[str, Range]()
        for op in self._operators:
            source = op.inputs[0] if op.inputs else ""
            if op.kind == _QUANTIZE:
                step = self._step(op.inputs[1])
                new[op.inputs[1]] = step.size
                if source not in self._held:
                    zero, size = float(step.zero), float(step.size.detach())
                    name = source.removesuffix(_GIVEN)
                    ranges[name] = (step.low - zero) * size, (step.high - zero) * size
            elif op.kind == _DEQUANTIZE and source in self._step_of:
                step = self._step(source)
                new[op.inputs[1]] = step.size
                new[source] = step.integers(self._value(source, {}))
            if op.kind in _WEIGHTED:
                new |= self._bias_of(op)
        for name in self._learned - new.keys():
            new[name] = self._value(name, {})
        for tensor in file.graph.initializer:
            if tensor.name in new:
                before = onnx.numpy_helper.to_array(tensor)
                value = (
                    new[tensor.name]
                    .detach()
                    .cpu()
                    .numpy()
                    .astype(before.dtype)
                    .reshape(before.shape)
                )
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        return _Trained(self._untrained, file, ranges)

    def _bias_of(self, op: Operator) -> dict[str, Tensor]:
        """Return a layer's biases as integers, and what else of the file they change.

        Their scale is the product of the other two's. A runtime takes it for that.
        """
        if (found := self._integer_parts(op)) is None:
            return {}
        data, weight, bias = found
        step, value = self._step(weight[0]), self._value(bias[0], {}).detach()
        of_data = self._step(data[1]).size.detach()
        least = value.abs() / of_data / _ROOM
        with torch.no_grad():  # a channel of hardly any weight has the scale that its bias needs
            least = least if step.step.numel() > 1 else least.amax()
            step.step.copy_(torch.maximum(step.step, least))
        scale = of_data * step.size.detach()
        return {
            weight[1]: step.size,
            weight[0]: step.integers(self._value(weight[0], {})),
            bias[1]: scale,
            bias[0]: (value.double() / scale.double()).round(),
        }

    def _integer_parts(self, op: Operator) -> tuple[tuple[str, ...], ...] | None:
        """Return what a layer's input, weights and biases are dequantized of; None if not all."""
        parts = [self._makers.get(name) for name in op.inputs] if op.kind in _WEIGHTED else []
        if len(parts) < 3 or any(part is None or part.kind != _DEQUANTIZE for part in parts):
            return None
        data, weight, bias = (part.inputs for part in parts if part is not None)
        known = weight[0] in self._step_of and bias[0] in self._learned
        return (data, weight, bias) if known else None

    def _rounded_bias(
        self, data: tuple[str, ...], weight: tuple[str, ...], bias: tuple[str, ...]
    ) -> Tensor:
        """Return a layer's biases as the file has them, with the gradient that they have here."""
        value = self._value(bias[0], {})
        scale = (self._step(data[1]).size * self._step(weight[0]).size).detach()
        return value + ((value / scale).round() * scale - value).detach()

    def _layer_constants(self, found: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield the constants that are layers' weights and biases, as the file has them."""
        for op in self._operators:
            for name in op.inputs[1:] if op.kind in _WEIGHTED else ():
                source, maker = name, self._makers.get(name)
                while maker is not None and maker.kind in {_QUANTIZE, _DEQUANTIZE}:
                    source = maker.inputs[0]
                    maker = self._makers.get(source)
                if source in found:
                    yield source

    def _add_steps(self, found: Mapping[str, Tensor]) -> None:
        for op in self._operators:
            source, axis = op.inputs[0] if op.inputs else "", op.attributes.get("axis", 1)
            if op.kind == _QUANTIZE and op.inputs[1] not in self._step_of:
                zero = found[op.inputs[2]]
                made = LearnedStep(
                    found[op.inputs[1]], zero, *_LIMITS[zero.dtype], axis, source in found
                )
                self._step_of[op.inputs[1]] = len(self._steps)
            elif (
                op.kind == _DEQUANTIZE
                and source in self._learned
                and source not in self._step_of
                and found[source].dtype == torch.int8
            ):
                zero = torch.zeros_like(found[op.inputs[1]])
                scale = found[op.inputs[1]]
                made = LearnedStep(scale, zero, *self._limits, axis, of_weights=True)
                self._step_of[source] = len(self._steps)
            else:
                continue
            self._steps.append(made)

    def _add_values(self, found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Hold the constants, those that are integers times their scale."""
        values = dict(found)
        for op in self._operators:
            if op.kind == _DEQUANTIZE and op.inputs[0] in found:
                values[op.inputs[0]] = _dequantized(op, found)
        for number, name in enumerate(found):
            value = weights.get(name, values[name]).clone()
            self._held[name] = f"constant_{number}"
            if name in self._learned:
                self.register_parameter(self._held[name], nn.Parameter(value))
            else:
                self.register_buffer(self._held[name], value)

    def _step(self, name: str) -> LearnedStep:
        found = self._steps[self._step_of[name]]
        assert isinstance(found, LearnedStep)
        return found

    def _value(self, name: str, there: Mapping[str, Tensor]) -> Tensor:
        """Return a tensor that was computed, or a constant."""
        value: Tensor = there[name] if name in there else getattr(self, self._held[name])
        return value


@dataclass(frozen=True)
class _Trained(Quantization):
    """A network in integers that was trained: which layers stay in float is settled.

    Args:
        untrained: the same before.
        file: a ``ModelProto``.
        ranges: of its activations.
    """

    untrained: Quantization
    file: Any
    ranges: Mapping[str, Range]

    def write(self, path: Path, keep_float: Collection[str] = ()) -> None:
        """Write the file in integers."""
        if keep_float:
            raise DreamkitError("a network that was trained in integers has its layers settled")
        path.write_bytes(self.file.SerializeToString())

    def write_float(self, path: Path) -> None:
        """Write the network in float, as it was before."""
        self.untrained.write_float(path)

    def look(self, path: Path, images: Tensor) -> FileLook:
        """Return how much noise integers and training make of every layer."""
        return self.untrained.look(path, images)

    def describe(self) -> Mapping[str, Any]:
        """Return what the file's JSON says of it."""
        told = dict(self.untrained.describe())
        ranges = {name: list(limits) for name, limits in self.ranges.items()}
        return {**told, "trained": "LSQ", "ranges": {**told.get("ranges", {}), **ranges}}


def _operator(node: Any, helper: Any) -> Operator:
    if len(node.output) != 1:
        raise DreamkitError(
            f"training in integers does not know operators of several outputs: {node.op_type} "
            f"({node.name})"
        )
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return Operator(node.name, node.op_type, tuple(node.input), node.output[0], attributes)


def _as_tensor(constant: Any) -> Tensor:
    """Return a file's constant; integers of 4 bits, which PyTorch computes nothing with, as 8."""
    array = np.array(constant)
    return torch.from_numpy(array.astype(np.int8) if array.dtype.name == "int4" else array)


def _dequantized(op: Operator, found: Mapping[str, Tensor]) -> Tensor:
    """Return integers of a file times their scale."""
    integers, scale = found[op.inputs[0]].float(), found[op.inputs[1]]
    zero = found[op.inputs[2]].float() if len(op.inputs) > 2 else torch.zeros_like(scale)
    shape = [1] * integers.dim()
    if scale.numel() > 1:
        shape[op.attributes.get("axis", 1)] = -1
    return (integers - zero.reshape(shape)) * scale.reshape(shape)
