"""Timing models in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.latency.processor import processor_name
from dreamkit.latency.sampling import alternate
from dreamkit.model_state import eval_mode
from dreamkit.types import LatencyBackend, Timing
from dreamkit.wording import one_line

OPSET = 18
_INPUT, _OUTPUT = "images", "logits"


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


class OnnxSession:
    """A model in ONNX Runtime.

    Args:
        model: serialised, or its file.
        threads: within an operator; None leaves the choice to the runtime.
        example: what ``run`` is given if nothing else is.
    """

    def __init__(self, model: bytes | Path, threads: int | None, example: Tensor) -> None:
        runtime = import_extra("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.inter_op_num_threads = 1
        # Threads that wait, spinning, for the next run would slow the other models down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else str(model)
        self._session = runtime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )
        self._name = self._session.get_inputs()[0].name
        self._example = {self._name: example.numpy()}

    def run(self, images: Tensor | None = None) -> Tensor:
        """Return the outputs for images, or for the example."""
        feed = self._example if images is None else {self._name: images.numpy()}
        return torch.from_numpy(self._session.run(None, feed)[0])


def as_onnx(module: nn.Module, example: Tensor, any_batch: bool = False) -> bytes:
    """Return a module in ONNX's format, by PyTorch's exporter.

    Args:
        module: on the CPU.
        example: an input.
        any_batch: whether it is to take any number of images, or the example's.

    Raises:
        DreamkitError: PyTorch cannot export it, or the extra ``onnx`` is not installed.
    """
    import_extra("onnx", "onnx")
    import_extra("onnxscript", "onnx")
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        with eval_mode(module), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # exporters fail in as many ways as models can be written
        reason = one_line(error)
        raise DreamkitError(f"the model cannot be exported as ONNX: {reason}") from error
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised


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
    inputs = [_INPUT, *tensors]
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        node = helper.make_node(
            "Conv",
            inputs,
            [_OUTPUT],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[*layer.padding, *layer.padding],
            dilations=list(layer.dilation),
            group=layer.groups,
        )
    else:
        node = helper.make_node("Gemm", inputs, [_OUTPUT], transB=1)
    number = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(_INPUT, number, list(example.shape))],
        [helper.make_tensor_value_info(_OUTPUT, number, list(output.shape))],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9  # what onnxruntime 1.18 reads
    serialised: bytes = model.SerializeToString()
    return serialised
