"""Timings that every rank takes from the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.types import LatencyBackend, Timing


class FirstRank:
    """A latency backend that the first rank alone uses, and tells the others what it measured.

    What is decided by latencies must be the same everywhere, and two ranks that time models at
    once on one machine time each other.

    Args:
        backend: that measures.
    """

    def __init__(self, backend: LatencyBackend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its input, in turn within one run."""
        return distributed.broadcast(self.backend.time(modules) if distributed.is_first() else [])
