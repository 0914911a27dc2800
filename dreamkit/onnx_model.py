"""Models in ONNX's format: written by PyTorch's exporter, and run by ONNX Runtime."""

from __future__ import annotations

import itertools
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.model_state import eval_mode
from dreamkit.wording import one_line

OPSET = 18
INPUT, OUTPUT = "images", "logits"
"""Names that an exported model's input and output have."""


class OnnxSession:
    """A model in ONNX Runtime.

    Args:
        model: serialised, or its file.
        threads: within an operator; None leaves the choice to the runtime.
        example: what ``run`` is given if nothing else is.
        exact: products of bytes are added without the saturation that fast kernels of x86 without
            VNNI have.
        as_written: operators are run as the file has them, none joined: so every tensor is there.

    Raises:
        DreamkitError: ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        model: bytes | Path,
        threads: int | None,
        example: Tensor,
        exact: bool = False,
        as_written: bool = False,
    ) -> None:
        runtime = import_extra("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.inter_op_num_threads = 1
        # Threads that wait, spinning, for the next run would slow the other models down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if as_written:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3  # what is wrong comes as an error
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = runtime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of classes of its own
            raise DreamkitError(
                f"ONNX Runtime {runtime.__version__} cannot load the model: {one_line(error)}"
            ) from error
        self._names = [output.name for output in self._session.get_outputs()]
        self._name = self._session.get_inputs()[0].name
        self._example = {self._name: example.numpy()}

    def run(self, images: Tensor | None = None) -> Tensor:
        """Return the outputs for images, or for the example."""
        feed = self._example if images is None else {self._name: images.numpy()}
        return torch.from_numpy(self._session.run(self._names[:1], feed)[0])

    def run_all(self, images: Tensor) -> dict[str, Tensor]:
        """Return every output by its name."""
        found = self._session.run(None, {self._name: images.numpy()})
        return {
            name: torch.from_numpy(value) for name, value in zip(self._names, found, strict=True)
        }


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
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # exporters fail in as many ways as models can be written
        reason = one_line(error)
        raise DreamkitError(f"the model cannot be exported as ONNX: {reason}") from error
    model = program.model_proto
    strip_traces(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def strip_traces(model: Any) -> None:
    """Take out of a ``ModelProto`` what tells of the machine that wrote it.

    The exporter keeps the stack trace of every operator, with the paths of its author's files.
    """
    graph = model.graph
    inside = (node for function in model.functions for node in function.node)
    held = (graph.input, graph.output, graph.value_info, graph.initializer, graph.node, inside)
    for thing in (model, graph, *model.functions, *itertools.chain(*held)):
        del thing.metadata_props[:]
        thing.ClearField("doc_string")
