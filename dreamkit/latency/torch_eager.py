"""Timing PyTorch modules as they are, on the CPU or a CUDA device."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import DreamkitError
from dreamkit.model_state import device_of, eval_mode
from dreamkit.types import Timing

_SAMPLE_MS = 0.5
"""A sample lasts at least this long: shorter ones measure the clock and the scheduler."""
_MAX_CALLS = 50


@dataclass(frozen=True)
class TorchCPU:
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
            return _alternate(modules, self.warmup, self.repeats, _nothing)
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class TorchCUDA:
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
                "use latency: {name: torch-cpu}"
            )


def _nothing() -> None:
    """Stand in for synchronisation where calls return when they are done."""


@torch.no_grad()
def _alternate(
    modules: Sequence[tuple[nn.Module, Tensor]],
    warmup: int,
    repeats: int,
    synchronise: Callable[[], Any],
) -> list[Timing]:
    with ExitStack() as stack:
        for module, _ in modules:
            stack.enter_context(eval_mode(module))
        calls = [_calls_per_sample(module, x, synchronise) for module, x in modules]
        samples: list[list[float]] = [[] for _ in modules]
        for repeat in range(-warmup, repeats):
            for number, (module, x) in enumerate(modules):
                ms = _sample(module, x, calls[number], synchronise)
                if repeat >= 0:
                    samples[number].append(ms)
    timings = []
    for values in samples:
        low, _, high = statistics.quantiles(values, n=4)
        timings.append(Timing(statistics.median(values), high - low))
    return timings


def _calls_per_sample(module: nn.Module, x: Tensor, synchronise: Callable[[], Any]) -> int:
    _sample(module, x, 1, synchronise)  # the first call allocates and picks kernels
    once = _sample(module, x, 1, synchronise)
    return max(1, min(_MAX_CALLS, round(_SAMPLE_MS / max(once, 1e-6))))


def _sample(module: nn.Module, x: Tensor, calls: int, synchronise: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        module(x)
    synchronise()
    return (time.perf_counter() - start) * 1e3 / calls


def processor_name() -> str:
    """Return the processor's name, and on Linux its family and model, which tell it apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (ln.partition(":") for ln in lines)}
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    return name
