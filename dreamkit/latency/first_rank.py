"""Timings that every rank takes from the first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.types import LatencyBackend, Timing


class FirstRank(LatencyBackend):
    """A latency backend that the first rank alone uses, and tells the others what it measured.

    What is decided by latencies must be the same everywhere, and two ranks that time models at
    once on one machine time each other.

    Args:
        backend: that measures.
    """

    def __init__(self, backend: LatencyBackend) -> None:
        self.backend = backend
        self.batch_size = backend.batch_size

    @property
    def folds_norms(self) -> bool:
        """The backend's."""
        return self.backend.folds_norms

    @property
    def channel_block(self) -> int:
        """The backend's."""
        return self.backend.channel_block

    @property
    def channel_multiple(self) -> int:
        """The backend's."""
        return self.backend.channel_multiple

    def remark(self, model: nn.Module, example: Tensor) -> str | None:
        """Return the backend's."""
        found = self.backend.remark(model, example) if distributed.is_first() else None
        return distributed.broadcast(found)

    def describe(self) -> dict[str, str]:
        """Return what the backend's figures hold for."""
        return self.backend.describe()

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its input, in turn within one run."""
        return distributed.broadcast(self.backend.time(modules) if distributed.is_first() else [])
