"""Timing models in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import import_extra
from dreamkit.latency.processor import processor_name
from dreamkit.latency.sampling import alternate
from dreamkit.onnx_model import INPUT, OPSET, OUTPUT, OnnxSession, as_onnx
from dreamkit.types import LatencyBackend, Timing


@dataclass(frozen=True)
class OnnxRuntime(LatencyBackend):
    """ONNX Runtime on this machine's processor, float32. Needs the extra ``onnx``.

    Args:
        batch_size: images in a forward pass.
        threads: within an operator; null leaves the choice to the runtime.
        warmup: untimed samples before the first.
        repeats: timed samples, of which the median counts.
    """

    batch_size: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    warmup: Annotated[int, Field(ge=0)] = 3
    repeats: Annotated[int, Field(ge=3)] = 15

    folds_norms = True
    # What its convolutions on channels in blocks ask for; others are slower.
    channel_block = 4

    def describe(self) -> dict[str, str]:
        """Return processor, runtime, dtype, threads and batch size."""
        runtime = import_extra("onnxruntime", "onnx")
        return {
            "device": processor_name(),
            "runtime": f"onnxruntime {runtime.__version__}",
            "dtype": "float32",
            "threads": str(self.threads or "default"),
            "batch_size": str(self.batch_size),
        }

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its CPU input; samples of different modules alternate."""
        calls = []
        for module, x in modules:
            layer = isinstance(module, nn.Conv2d | nn.Linear) and x.dim() in (2, 4)
            model = layer_as_onnx(module, x) if layer else as_onnx(module, x)
            calls.append(OnnxSession(model, self.threads, x).run)
        return alternate(calls, self.warmup, self.repeats)


def layer_as_onnx(layer: nn.Module, example: Tensor) -> bytes:
    """Return one convolution or linear layer in ONNX's format.

    PyTorch's exporter takes a second for what a look-up table needs hundreds of.
    """
    onnx = import_extra("onnx", "onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    with torch.no_grad():
        output = layer(example)
    weights = {"w": layer.weight, "b": layer.bias}
    tensors = {k: w.detach().numpy() for k, w in weights.items() if isinstance(w, Tensor)}
    inputs = [INPUT, *tensors]
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        node = helper.make_node(
            "Conv",
            inputs,
            [OUTPUT],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[*layer.padding, *layer.padding],
            dilations=list(layer.dilation),
            group=layer.groups,
        )
    else:
        node = helper.make_node("Gemm", inputs, [OUTPUT], transB=1)
    number = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(INPUT, number, list(example.shape))],
        [helper.make_tensor_value_info(OUTPUT, number, list(output.shape))],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9  # what onnxruntime 1.18 reads
    serialised: bytes = model.SerializeToString()
    return serialised
