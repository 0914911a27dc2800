"""What flows through a model in ONNX's format, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dreamkit.errors import import_extra
from dreamkit.onnx_model import OnnxSession

WATCHED = 8
"""Images of a pass that all tensors are kept of at a time."""


def values_of(
    model: Any, names: Collection[str], batches: Iterable[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield tensors of a model by their names, batch by batch.

    Args:
        model: a ``ModelProto``; it stays as it is.
        names: of float tensors.
        batches: normalised images (N, C, H, W).
    """
    onnx = import_extra("onnx", "onnx")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {value.name for value in watched.graph.input}
    there = {value.name for value in watched.graph.output}
    for name in names:
        if name not in there | given:
            # Whatever its shape.
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            watched.graph.output.append(value)
    session = OnnxSession(watched.SerializeToString(), None, torch.zeros(()), as_written=True)
    for images in batches:
        found = session.run_all(images)
        found |= dict.fromkeys(given, images)
        yield {name: found[name] for name in names}
