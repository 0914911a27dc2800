"""The formats that a model can be exported to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.deploy.sparse_weights import patterns_of, with_patterns
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.types import Exporter


class Onnx(Exporter):
    """ONNX, run by ONNX Runtime. Needs the extra ``onnx``.

    Where a network was pruned to a pattern, the metadata say which of the file's weights have it.
    """

    suffix = ".onnx"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file."""
        written, patterns = as_onnx(model, example, any_batch=any_batch), patterns_of(model)
        path.write_bytes(with_patterns(written, patterns) if patterns else written)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return OnnxSession(path, None, torch.zeros(())).run


class TorchExport(Exporter):
    """A program of ``torch.export``."""

    suffix = ".pt2"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file."""
        shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return torch.export.load(path).module()


class TorchScript(Exporter):
    """TorchScript, by tracing."""

    suffix = ".pt"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file, which takes any number of images in any case."""
        torch.jit.trace(model, example, check_trace=False).save(str(path))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        program: Any = torch.jit.load(str(path))
        return program  # type: ignore[no-any-return]
