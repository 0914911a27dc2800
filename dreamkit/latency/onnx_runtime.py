"""Timing models in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import import_extra
from dreamkit.latency.onnx_layers import layer_as_onnx, layer_in_integers
from dreamkit.latency.processor import processor_name
from dreamkit.latency.sampling import alternate
from dreamkit.onnx_int8 import NUMBERS, computed_in_float, in_integers
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.types import LatencyBackend, Timing


@dataclass(frozen=True)
class OnnxRuntime(LatencyBackend):
    """ONNX Runtime on this machine's processor. Needs the extra ``onnx``.

    In ``int8`` a network is timed as the quantizer ``onnxruntime`` writes it for its target
    ``portable``: QDQ, with a scale for each output channel of the weights. Ranges of activations
    are those of a noise image, which changes no time. Operators that there are no integers for
    stay in float. A layer of a look-up table is timed between activations in bytes.

    Args:
        batch_size: images in a forward pass.
        threads: within an operator; null leaves the choice to the runtime.
        dtype: of weights and activations.
        warmup: untimed samples before the first.
        repeats: timed samples, of which the median counts.
    """

    batch_size: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["float32", "int8"] = "float32"
    warmup: Annotated[int, Field(ge=0)] = 3
    repeats: Annotated[int, Field(ge=3)] = 15

    folds_norms = True

    @property
    def channel_block(self) -> int:
        """What its convolutions on channels in blocks ask for; others are slower."""
        return 16 if self.dtype == "int8" else 4

    @property
    def channel_multiple(self) -> int:
        """Of bytes its kernels take 16 together, most of all those of depthwise layers."""
        return 16 if self.dtype == "int8" else 1

    def describe(self) -> dict[str, str]:
        """Return processor, runtime, dtype, threads and batch size."""
        runtime = import_extra("onnxruntime", "onnx")
        return {
            "device": processor_name(),
            "runtime": f"onnxruntime {runtime.__version__}",
            "dtype": self.dtype,
            "threads": str(self.threads or "default"),
            "batch_size": str(self.batch_size),
        }

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its CPU input; samples of different modules alternate."""
        calls = [OnnxSession(*self._model(*pair)).run for pair in modules]
        return alternate(calls, self.warmup, self.repeats)

    def remark(self, model: nn.Module, example: Tensor) -> str | None:
        """Return which operators of a network are timed in float, where that is not asked for."""
        if self.dtype == "float32":
            return None
        counts = sorted(computed_in_float(network_in_integers(model, example)).items())
        if not counts:
            return None
        listed = ", ".join(f"{name} ({number})" for name, number in counts)
        return (
            f"operators that are timed in float, as ONNX Runtime has no integers for them: {listed}"
        )

    def _model(self, module: nn.Module, x: Tensor) -> tuple[bytes, int | None, Tensor]:
        """Return a module as it is timed, the threads, and its input."""
        layer = isinstance(module, nn.Conv2d | nn.Linear) and x.dim() in (2, 4)
        layer = layer and not isinstance(getattr(module, "padding", 0), str)
        if self.dtype == "float32":
            model = layer_as_onnx(module, x) if layer else as_onnx(module, x)
        elif layer:
            model, x = layer_in_integers(module, x)
        else:
            model = network_in_integers(module, x)
        return model, self.threads, x


def network_in_integers(model: nn.Module, example: Tensor) -> bytes:
    """Return a network with all in integers that there are some for, and ranges of noise.

    Args:
        model: on the CPU.
        example: an input, of which the shape counts.
    """
    onnx = import_extra("onnx", "onnx")
    image = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    exported = onnx.load_model_from_string(as_onnx(model, example))
    proto = onnx.shape_inference.infer_shapes(exported)
    with tempfile.TemporaryDirectory() as folder:
        made = in_integers(proto, NUMBERS["portable"], True, image, {}, Path(folder))
    serialised: bytes = made.SerializeToString()
    return serialised
