"""Files that other runtimes read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn


class Exporter(ABC):
    """An entry of ``exporters``: a format of files that other runtimes read.

    What is written is run and held against the model before it is kept. Either method may raise
    whatever it likes: the user is told that the model cannot be exported, and why.
    """

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Ending of the file's name, such as ``.onnx``."""

    @abstractmethod
    def write(self, model: nn.Module, example: Tensor, path: Path, any_batch: bool) -> None:
        """Write a model to a file.

        Args:
            model: in eval mode, on the CPU; takes normalised images (N, C, H, W), returns (N, K).
            example: images that it takes.
            path: of the file.
            any_batch: whether the file is to take any number of images, or the example's.
        """

    @abstractmethod
    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return what runs such a file: images (N, C, H, W) on the CPU to outputs (N, K)."""
