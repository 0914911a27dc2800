"""Single layers in ONNX's format, in float and between bytes.

PyTorch's exporter takes a second for what a look-up table needs hundreds of, and ONNX Runtime's
quantisation another tenth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import import_extra
from dreamkit.onnx_model import INPUT, OPSET, OUTPUT

_CHANNELS_LAST, _CHANNELS_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)
_BYTE, _WEIGHT = 127, 64
"""The largest of a byte about its zero point, and of a weight of 7 bits."""


def layer_as_onnx(layer: nn.Module, example: Tensor) -> bytes:
    """Return one convolution or linear layer in ONNX's format.

    Args:
        layer: on the CPU.
        example: an input, (N, C, H, W) or (N, C).
    """
    with torch.no_grad():
        output = layer(example)
    tensors = {"w": layer.weight, "b": layer.bias}
    constants = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    node = _operator(layer, [INPUT, *constants], OUTPUT)
    return _serialised([node], example, output, constants)


def layer_in_integers(layer: nn.Module, example: Tensor) -> tuple[bytes, Tensor]:
    """Return one convolution or linear layer between bytes (QDQ), and its input in bytes.

    What stands around it in a network in integers is left out: that gives it bytes, takes bytes
    from it, and lays maps out with their channels last, (N, H, W, C). Weights are of 7 bits, with a
    scale for each output channel; scales are those of the example.

    Args:
        layer: on the CPU.
        example: an input, (N, C, H, W) or (N, C).
    """
    helper = import_extra("onnx", "onnx").helper
    with torch.no_grad():
        output = layer(example)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    each = _scale(weight.flatten(1), 1, _WEIGHT)
    into, out = (_scale(value.flatten(), 0, _BYTE) for value in (example, output))
    rounded = (weight / each.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    zero = torch.tensor(_BYTE + 1, dtype=torch.uint8)
    constants = {
        **{"x_scale": into, "y_scale": out, "zero": zero, "w": rounded, "w_scale": each},
        "w_zero": torch.zeros_like(each, dtype=torch.int8),
    }
    inputs = ["x_float", "w_float"]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "zero"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=0),
    ]
    if isinstance(bias, Tensor):
        scale = each * into
        constants |= {
            **{"b": (bias / scale).round().to(torch.int32), "b_scale": scale},
            "b_zero": torch.zeros_like(each, dtype=torch.int32),
        }
        nodes.append(
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["b_float"], axis=0)
        )
        inputs.append("b_float")
    nodes += [
        _operator(layer, inputs, "y_float"),
        helper.make_node("QuantizeLinear", ["y_float", "y_scale", "zero"], ["y"]),
    ]
    given, made = (_in_bytes(value, scale) for value, scale in ((example, into), (output, out)))
    if example.dim() == 4:
        # The runtime computes maps with their channels last: these cancel against its own.
        given, made = (value.permute(_CHANNELS_LAST) for value in (given, made))
        first = helper.make_node("Transpose", [INPUT], ["x"], perm=_CHANNELS_SECOND)
        last = helper.make_node("Transpose", ["y"], [OUTPUT], perm=_CHANNELS_LAST)
    else:
        first = helper.make_node("Identity", [INPUT], ["x"])
        last = helper.make_node("Identity", ["y"], [OUTPUT])
    given = given.contiguous()
    return _serialised([first, *nodes, last], given, made, constants), given


def _scale(values: Tensor, dim: int, largest: int) -> Tensor:
    """Return by what values are divided so that they become integers of some size at the most."""
    return (values.abs().amax(dim) / largest).clamp(min=1e-6)


def _in_bytes(values: Tensor, scale: Tensor) -> Tensor:
    return ((values / scale).round() + _BYTE + 1).clamp(0, 255).to(torch.uint8)


def _operator(layer: nn.Module, inputs: Sequence[str], output: str) -> Any:
    helper = import_extra("onnx", "onnx").helper
    if not isinstance(layer, nn.Conv2d):
        return helper.make_node("Gemm", inputs, [output], transB=1)
    assert not isinstance(layer.padding, str)
    return helper.make_node(
        "Conv",
        inputs,
        [output],
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _serialised(
    nodes: Sequence[Any], example: Tensor, output: Tensor, constants: Mapping[str, Tensor]
) -> bytes:
    onnx = import_extra("onnx", "onnx")
    helper, arrays = onnx.helper, onnx.numpy_helper

    def described(name: str, value: Tensor) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
        return helper.make_tensor_value_info(name, kind, list(value.shape))

    graph = helper.make_graph(
        nodes,
        "layer",
        [described(INPUT, example)],
        [described(OUTPUT, output)],
        [arrays.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9  # what onnxruntime 1.18 reads
    serialised: bytes = model.SerializeToString()
    return serialised
