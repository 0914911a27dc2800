"""Timing PyTorch modules as they are, on the CPU or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.allocator import freed_memory_kept
from dreamkit.errors import DreamkitError
from dreamkit.latency.processor import processor_name
from dreamkit.latency.sampling import alternate, nothing
from dreamkit.model_state import device_of, eval_mode
from dreamkit.types import LatencyBackend, Timing


@dataclass(frozen=True)
class TorchCPU(LatencyBackend):
    """PyTorch eager mode on this machine's processor, float32.

    Args:
        batch_size: images in a forward pass.
        threads: 1 or more, pinned while timing; null keeps torch's setting.
        warmup: untimed samples before the first.
        repeats: timed samples, of which the median counts.
    """

    batch_size: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    warmup: Annotated[int, Field(ge=0)] = 3
    repeats: Annotated[int, Field(ge=3)] = 15

    @property
    def channel_block(self) -> int:
        """Floats of a vector: oneDNN lays channels out in blocks of as many."""
        return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8

    def describe(self) -> dict[str, str]:
        """Return processor, runtime, dtype, threads and batch size."""
        return {
            "device": processor_name(),
            "runtime": f"torch {torch.__version__} eager",
            "dtype": "float32",
            "threads": str(self.threads or torch.get_num_threads()),
            "batch_size": str(self.batch_size),
        }

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its CPU input; samples of different modules alternate."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with freed_memory_kept():  # else page faults are a third of a small network's time
                return _alternate(modules, self.warmup, self.repeats)
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class TorchCUDA(LatencyBackend):
    """PyTorch eager mode on the CUDA device of the run, float32 as torch is set (TF32 or not).

    Args:
        batch_size: images in a forward pass.
        warmup: untimed samples before the first.
        repeats: timed samples, of which the median counts.
    """

    batch_size: Annotated[int, Field(ge=1)] = 1
    warmup: Annotated[int, Field(ge=0)] = 10
    repeats: Annotated[int, Field(ge=3)] = 31

    def describe(self) -> dict[str, str]:
        """Return device, runtime, dtype and batch size."""
        self._check()
        return {
            "device": torch.cuda.get_device_name(),
            "runtime": f"torch {torch.__version__} eager",
            "dtype": "float32 (TF32)" if torch.backends.cudnn.allow_tf32 else "float32",
            "threads": "-",
            "batch_size": str(self.batch_size),
        }

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules; they and their inputs are moved to the device and back."""
        self._check()
        homes = [device_of(module) for module, _ in modules]
        try:
            moved = [(module.cuda(), x.cuda()) for module, x in modules]
            return _alternate(moved, self.warmup, self.repeats, torch.cuda.synchronize)
        finally:
            for (module, _), home in zip(modules, homes, strict=True):
                module.to(home)

    def _check(self) -> None:
        if not torch.cuda.is_available():
            raise DreamkitError(
                "the latency backend torch-cuda needs a CUDA device, and torch sees none; "
                "use the backend torch-cpu"
            )


@torch.no_grad()
def _alternate(
    modules: Sequence[tuple[nn.Module, Tensor]],
    warmup: int,
    repeats: int,
    synchronise: Callable[[], Any] = nothing,
) -> list[Timing]:
    with ExitStack() as stack:
        for module, _ in modules:
            stack.enter_context(eval_mode(module))
        return alternate([partial(m, x) for m, x in modules], warmup, repeats, synchronise)
