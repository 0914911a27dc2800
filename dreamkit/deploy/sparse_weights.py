"""Patterns of zeros in ONNX files: looked up in what was written, and told in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import import_extra
from dreamkit.pruning.pattern import Pattern, has_pattern

METADATA = "dreamkit.patterns"
"""Key of the metadata: JSON, by the name of a weight in the file its pattern."""


def patterns_of(model: nn.Module) -> list[str]:
    """Return the patterns that a network was pruned to, as its provenance tells."""
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Mapping):
        return []
    return sorted(set(provenance.get("pruning_record", {}).get("patterns", {}).values()))


def with_patterns(serialised: bytes, patterns: list[str]) -> bytes:
    """Return an ONNX model whose metadata says which of its weights have which pattern.

    Args:
        serialised: the model.
        patterns: to look for; a weight is said to have the first that it has.
    """
    onnx = import_extra("onnx", "onnx")
    model = onnx.load_model_from_string(serialised)
    found = {}
    for name, weight in _weights(model.graph):
        held = [text for text in patterns if has_pattern(weight, Pattern.parse(text))]
        if held:
            found[name] = held[0]
    if found:
        model.metadata_props.add(key=METADATA, value=json.dumps(found))
    written: bytes = model.SerializeToString()
    return written


def _weights(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what convolutions and products of matrices multiply with, as (out, in, ...)."""
    helper = import_extra("onnx.numpy_helper", "onnx")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.input[1] not in stored:
            continue
        weight = torch.tensor(helper.to_array(stored[node.input[1]]))
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type == "Conv" or transposed:
            yield node.input[1], weight
        elif weight.dim() == 2:
            yield node.input[1], weight.T
