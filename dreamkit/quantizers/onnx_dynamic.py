"""Dynamic INT8 for ONNX Runtime: linear layers, with ranges taken as images pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.onnx_int8 import NUMBERS, computed_in_float, linear_in_integers
from dreamkit.onnx_model import INPUT, OPSET, OUTPUT, OnnxSession, as_onnx
from dreamkit.quantizers.float_graph import FloatGraph, Layer
from dreamkit.quantizers.signal_to_noise import signal_to_noise
from dreamkit.quantizers.targets import resolved, this_processor, told
from dreamkit.quantizers.watching import WATCHED
from dreamkit.types import FileLook, Quantization, QuantizationStep, Quantizer

LINEAR = {"Gemm", "MatMul"}


@dataclass(frozen=True)
class OnnxDynamicQuantizer(Quantizer):
    """Dynamic INT8 of linear layers in ONNX, run by ONNX Runtime. Needs the extra ``onnx``.

    What goes into a layer is rounded by its own range each time it runs, so that no image is wanted
    to calibrate on. That is the range over all images of a pass: an image's outputs depend a little
    on what it is shown with. Transformers consist of such layers; convolutions stay in float, and a
    CNN has next to nothing in integers.

    Args:
        target: the processor that the file will meet. ``portable``: weights of 7 bits, right on any
            x86 and ARM. ``vnni``, ``arm``: 8 bits; on x86 without VNNI sums of products saturate.
            ``auto``: what suits this machine's processor.
        per_channel: a scale for each output channel of the weights, not one for all.
    """

    target: Literal["portable", "vnni", "arm", "auto"] = "portable"
    per_channel: bool = True

    @property
    def suffix(self) -> str:
        """Ending of the file's name."""
        return ".int8.onnx"

    @property
    def calibrates(self) -> bool:
        """Whether images decide on its files."""
        return False

    def calibrate(self, step: QuantizationStep) -> OnnxDynamicQuantization:
        """Export a network; no range is taken.

        Raises:
            DreamkitError: it has no linear layer.
        """
        import_extra("onnxruntime", "onnx")
        graph = FloatGraph(as_onnx(step.model, next(iter(step.batches())), any_batch=True))
        if not any(layer.op_type in LINEAR for layer in graph.layers):
            raise DreamkitError(
                "the network has no linear layer; {name: onnxruntime} has convolutions in "
                "integers too",
                ("quantizer",),
            )
        return OnnxDynamicQuantization(graph, resolved(self.target), self.per_channel, step.folder)

    def load(
        self, path: Path, threads: int | None = None, exact: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return OnnxSession(path, threads, torch.zeros(()), exact=exact).run

    def note(self) -> str | None:
        """Return what the user must know of the target on this machine."""
        return told(self.target)


@dataclass(frozen=True)
class OnnxDynamicQuantization(Quantization):
    """A network in ONNX whose linear layers can be written in integers.

    Args:
        graph: in float.
        target: the processor that the file will meet.
        per_channel: a scale for each output channel of the weights.
        folder: for files of the work.
    """

    graph: FloatGraph
    target: str
    per_channel: bool
    folder: Path

    @property
    def linear(self) -> tuple[Layer, ...]:
        """The layers that can be in integers."""
        return tuple(layer for layer in self.graph.layers if layer.op_type in LINEAR)

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names, in forward order."""
        return tuple(dict.fromkeys(layer.name for layer in self.linear))

    def write(self, path: Path, keep_float: Collection[str] = ()) -> None:
        """Write the file in integers."""
        kept = [layer.node for layer in self.linear if layer.name in keep_float]
        made = linear_in_integers(
            self.graph.proto, NUMBERS[self.target], self.per_channel, kept, self.folder
        )
        path.write_bytes(made.SerializeToString())

    def write_float(self, path: Path) -> None:
        """Write the network in float."""
        path.write_bytes(self.graph.serialised())

    def look(self, path: Path, images: Tensor) -> FileLook:
        """Return how much noise integers make of every layer, and what stayed in float."""
        made = import_extra("onnx", "onnx").load_model(path)
        outputs = {layer.output: layer.output for layer in self.graph.layers}
        noise = signal_to_noise(self.graph.proto, made, outputs, images.split(WATCHED))
        by_layer = {layer.name: noise[layer.output] for layer in self.graph.layers}
        return FileLook(by_layer, computed_in_float(path))

    def describe(self) -> dict[str, Any]:
        """Return what the file's JSON says of it."""
        each = "channel" if self.per_channel else "tensor"
        return {
            "backend": "onnxruntime",
            "version": import_extra("onnxruntime", "onnx").__version__,
            "format": "dynamic",
            "opset": OPSET,
            "input": INPUT,
            "output": OUTPUT,
            "weights": f"int8, {NUMBERS[self.target].weight_bits} bits, symmetric, per {each}",
            "activations": "uint8, by the range of what passes",
            "target": self.target,
            "processor": this_processor().describe(),
        }
