"""Layers of a file in integers that go back to float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamkit.errors import import_extra
from dreamkit.quantizers.float_graph import FloatGraph, Layer

_LARGEST = "largest_float"


def put_back(made: Any, graph: FloatGraph, layers: Sequence[Layer]) -> None:
    """Give layers of a ``ModelProto`` in integers their weights in float.

    Where float weights stand between a dequantized input and a quantized output, ONNX Runtime makes
    them integers itself when it loads the file, with one scale for all. Not so behind an operator
    that it does not know to do nothing: the least of a value and the largest float.

    Args:
        made: is changed.
        graph: in float.
        layers: of it.
    """
    onnx = import_extra("onnx", "onnx")
    there = made.graph
    known = set[str]()
    for layer in layers:
        (node,) = (node for node in there.node if node.name == layer.node)
        constants = list(filter(None, (layer.weight, layer.bias)))
        for constant in constants:
            if constant not in known:
                value = graph.constant(constant).numpy()
                there.initializer.append(onnx.numpy_helper.from_array(value, _named(constant)))
                known.add(constant)
        if _LARGEST not in known:
            largest = np.array(np.finfo(np.float32).max, np.float32)
            there.initializer.append(onnx.numpy_helper.from_array(largest, _LARGEST))
            known.add(_LARGEST)
        name = f"{layer.node}_in_float"
        operator = onnx.helper.make_node("Min", [node.input[0], _LARGEST], [name], name=name)
        there.node.insert(list(there.node).index(node), operator)
        del node.input[:]
        node.input.extend([name, *map(_named, constants)])
        _leave_outputs_as_they_are(there, node)
    _drop_what_is_not_used(there)


def _named(constant: str) -> str:
    """Return what a constant in float is called: integers that are read back have its own name."""
    return f"{constant}_in_float"


def _leave_outputs_as_they_are(there: Any, node: Any) -> None:
    """Take away the integers between a layer and the outputs of the network."""
    outputs = {value.name for value in there.output}
    for quantize in [n for n in there.node if n.input[0] == node.output[0]]:
        reads = [n for n in there.node if n.input[0] == quantize.output[0]]
        if (
            quantize.op_type == "QuantizeLinear"
            and len(reads) == 1
            and reads[0].output[0] in outputs
        ):
            node.output[0] = reads[0].output[0]
            there.node.remove(reads[0])
            there.node.remove(quantize)


def _drop_what_is_not_used(there: Any) -> None:
    """Remove operators and constants that nothing reads."""
    outputs = {value.name for value in there.output}
    while True:
        used = outputs | {name for node in there.node for name in node.input}
        dead = [node for node in there.node if not used & set(node.output)]
        if not dead:
            break
        for node in dead:
            there.node.remove(node)
    for tensor in [tensor for tensor in there.initializer if tensor.name not in used]:
        there.initializer.remove(tensor)
