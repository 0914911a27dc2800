"""Networks in ONNX with quantize and dequantize operators (QDQ), by ONNX Runtime's tools."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.onnx_model import strip_traces
from dreamkit.wording import one_line

_TENSORRT = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add"]
"""It joins other operators with these itself."""
_TO_INTEGERS = {"QuantizeLinear", "DynamicQuantizeLinear"}
_FROM_INTEGERS = {"DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
"""The last two compute in integers, and put floats out."""


@dataclass(frozen=True)
class Numbers:
    """How weights and activations are written.

    Args:
        weight_bits: 8, or 7 where pairs of products of bytes are added in 16 bits, as x86 without
            VNNI does: 2·255·64 fits, 2·255·127 does not. Or 4, two in a byte, which ONNX Runtime
            makes float again when it loads the file.
        signed_activations: bytes from -128 to 127, or else from 0 to 255.
        symmetric: activations have no zero point: their range is as far below zero as above it.
        pairs_on_weights: weights stay in float, with a quantize and a dequantize operator.
    """

    weight_bits: int = 8
    signed_activations: bool = False
    symmetric: bool = False
    pairs_on_weights: bool = False

    @property
    def weight_limits(self) -> tuple[int, int]:
        """The smallest and the largest integer of a weight."""
        return {4: (-8, 7), 7: (-64, 64), 8: (-127, 127)}[self.weight_bits]


@dataclass(frozen=True)
class WeightSteps:
    """What the integers of a layer's weights are multiplied by.

    Args:
        steps: for each channel (C,), or one for all (1,).
        axis: of the channels; None for one step.
    """

    steps: Tensor
    axis: int | None

    def override(self) -> list[dict[str, Any]]:
        """Return it as ONNX Runtime's tools take it."""
        where = {} if self.axis is None else {"axis": self.axis}
        return [{"scale": np.float32(step), "zero_point": 0, **where} for step in self.steps]


NUMBERS: Mapping[str, Numbers] = {
    "portable": Numbers(weight_bits=7),
    "vnni": Numbers(),
    # Its kernels ask for weights without a zero point; of activations any will do.
    "arm": Numbers(signed_activations=True),
    "tensorrt": Numbers(signed_activations=True, symmetric=True, pairs_on_weights=True),
}


def in_integers(
    model: Any,
    numbers: Numbers,
    per_channel: bool,
    image: Tensor,
    ranges: Mapping[str, tuple[float, float]],
    folder: Path,
    steps: Mapping[str, WeightSteps] = MappingProxyType({}),
) -> Any:
    """Return a ``ModelProto`` with every layer in integers that ONNX Runtime has some for.

    Args:
        model: a ``ModelProto`` in float, with the types of its tensors; it stays as it is.
        numbers: how weights and activations are written.
        per_channel: a scale for each output channel of the weights.
        image: an input; of tensors without a range what it makes of them is taken.
        ranges: of tensors, by name.
        folder: for files of the work.
        steps: of weights, by tensor; the largest weight decides on those of others.

    Raises:
        DreamkitError: ONNX Runtime's tools cannot do it.
    """
    onnx = import_extra("onnx", "onnx")
    tools = import_extra("onnxruntime.quantization", "onnx")
    kind = tools.QuantType.QInt8 if numbers.signed_activations else tools.QuantType.QUInt8
    of_weights = tools.QuantType.QInt4 if numbers.weight_bits == 4 else tools.QuantType.QInt8
    given = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
        for name, (low, high) in ranges.items()
    }
    given |= {name: some.override() for name, some in steps.items()}
    extra: dict[str, Any] = {"TensorQuantOverrides": given}
    operators = None
    extra["ActivationSymmetric"] = numbers.symmetric
    if numbers.pairs_on_weights:
        operators = _TENSORRT
        extra |= {
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": _TENSORRT,
        }
    file = folder / "quantized.onnx"
    with _quietly():
        tools.quantize_static(
            model,
            file,
            # It insists on calibrating, even if every range is given.
            _OneImage(model.graph.input[0].name, image),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=per_channel,
            reduce_range=numbers.weight_bits == 7,
            activation_type=kind,
            weight_type=of_weights,
            extra_options=extra,
        )
    made = onnx.load_model(file)
    file.unlink()
    strip_traces(made)
    return made


def linear_in_integers(
    model: Any, numbers: Numbers, per_channel: bool, keep_float: Sequence[str], folder: Path
) -> Any:
    """Return a ``ModelProto`` with linear layers in integers that take ranges as they run.

    Args:
        model: a ``ModelProto`` in float; it stays as it is.
        numbers: how weights are written.
        per_channel: a scale for each output channel of the weights.
        keep_float: nodes that stay in float, by name.
        folder: for files of the work.

    Raises:
        DreamkitError: ONNX Runtime's tools cannot do it.
    """
    onnx = import_extra("onnx", "onnx")
    tools = import_extra("onnxruntime.quantization", "onnx")
    copied, file = onnx.ModelProto(), folder / "quantized.onnx"
    copied.CopyFrom(model)
    with _quietly():
        tools.quantize_dynamic(
            copied,
            file,
            op_types_to_quantize=["Gemm", "MatMul"],
            per_channel=per_channel,
            reduce_range=numbers.weight_bits == 7,
            weight_type=tools.QuantType.QInt8,
            # A Gemm becomes a MatMul of this name and an Add first.
            nodes_to_exclude=[*keep_float, *(f"{node}_MatMul" for node in keep_float)],
            extra_options={"MatMulConstBOnly": True},  # products of attention stay in float
        )
    made = onnx.load_model(file)
    file.unlink()
    strip_traces(made)
    return made


def computed_in_float(model: bytes | Path) -> dict[str, int]:
    """Return how many operators of each type ONNX Runtime computes in float, once it has joined
    what it can: those that see what was dequantized.

    Args:
        model: in integers, serialised, or its file.
    """
    graph = joined(model).graph
    floats, counts = {value.name for value in graph.input}, Counter[str]()
    for node in graph.node:
        if node.op_type in _FROM_INTEGERS:
            floats |= set(node.output)
        elif node.op_type not in _TO_INTEGERS and floats & set(node.input):
            floats |= set(node.output)
            counts[node.op_type] += 1
    return dict(counts)


def joined(model: bytes | Path) -> Any:
    """Return the ``ModelProto`` that ONNX Runtime makes of a model, operators joined.

    Args:
        model: serialised, or its file.
    """
    runtime, onnx = import_extra("onnxruntime", "onnx"), import_extra("onnx", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    source = model if isinstance(model, bytes) else str(model)
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load_model(optimised)


class _OneImage:
    """A calibration set of one image.

    Args:
        name: of the model's input.
        image: normalised (N, C, H, W).
    """

    def __init__(self, name: str, image: Tensor) -> None:
        self._left = [{name: image.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        """Return the image, and then None."""
        return self._left.pop() if self._left else None


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep ONNX Runtime's tools from writing to the standard output and the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    except Exception as error:
        raise DreamkitError(f"ONNX Runtime cannot quantise it: {one_line(error)}") from error
    finally:
        logging.disable(before)
