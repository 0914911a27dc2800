"""The formats that a model can be exported to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dreamkit.latency.onnx_runtime import OnnxSession, as_onnx


class Onnx:
    """ONNX, run by ONNX Runtime. Needs the extra ``onnx``."""

    suffix: ClassVar[str] = ".onnx"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file."""
        path.write_bytes(as_onnx(model, example, any_batch=any_batch))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return OnnxSession(path, None, torch.zeros(())).run


class TorchExport:
    """A program of ``torch.export``."""

    suffix: ClassVar[str] = ".pt2"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file."""
        shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return torch.export.load(path).module()


class TorchScript:
    """TorchScript, by tracing."""

    suffix: ClassVar[str] = ".pt"

    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file, which takes any number of images in any case."""
        torch.jit.trace(model, example, check_trace=False).save(str(path))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        program: Any = torch.jit.load(str(path))
        return program  # type: ignore[no-any-return]
