"""Timing calls in turn, so that what slows the machine down slows all of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dreamkit.types import LatencyBackend, Timing

_SAMPLE_MS = 0.5
"""A sample lasts at least this long: shorter ones measure the clock and the scheduler."""
_MAX_CALLS = 50
_RUNS = 3
"""Times that modules are timed at the least: a sample may be a tenth off."""
_SURE = 5e-3
"""They are timed until their means are as sure on average: standard error, a share of them."""
_AGREED = 0.1
"""Two timings of one network that differ by more are settled by a third: a machine that other work
keeps busy may take tens of times as long for seconds."""
NOISY = 0.2
"""Where even the nearest two of three differ by more, there is nothing that can be told."""


def nothing() -> None:
    """Stand in for synchronisation where calls return when they are done."""


def alternate(
    calls: Sequence[Callable[[], Any]],
    warmup: int,
    repeats: int,
    synchronise: Callable[[], Any] = nothing,
) -> list[Timing]:
    """Time calls; samples of different calls alternate.

    Args:
        calls: what to time.
        warmup: untimed samples of each before the first.
        repeats: timed samples of each, of which the median counts.
        synchronise: waits until what was called is done.
    """
    numbers = [_calls_per_sample(call, synchronise) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for repeat in range(-warmup, repeats):
        for call, number, values in zip(calls, numbers, samples, strict=True):
            ms = _sample(call, number, synchronise)
            if repeat >= 0:
                values.append(ms)
    timings = []
    for values in samples:
        low, _, high = statistics.quantiles(values, n=4)
        timings.append(Timing(statistics.median(values), high - low))
    return timings


def _calls_per_sample(call: Callable[[], Any], synchronise: Callable[[], Any]) -> int:
    _sample(call, 1, synchronise)  # the first call allocates and picks kernels
    once = _sample(call, 1, synchronise)
    return max(1, min(_MAX_CALLS, round(_SAMPLE_MS / max(once, 1e-6))))


def _sample(call: Callable[[], Any], number: int, synchronise: Callable[[], Any]) -> float:
    call()  # brings back what other calls drove out: the caches', and the runtime's kernels
    synchronise()
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronise()
    return (time.perf_counter() - start) * 1e3 / number


def repeated_times(
    backend: LatencyBackend, modules: Sequence[tuple[nn.Module, Tensor]]
) -> tuple[list[Timing], float]:
    """Time modules in turn twice, and once more where the two do not agree.

    Args:
        backend: that measures.
        modules: each with its input.

    Returns:
        For each module the median of its times, with the spread within one; and by how much the
        nearest two of these differ, of the module that is least sure, as a share of them.
    """
    runs = [backend.time(modules) for _ in range(2)]
    if _disagreement(runs) > _AGREED:
        runs.append(backend.time(modules))
    found = [
        Timing(
            statistics.median(timing.median_ms for timing in each),
            statistics.median(timing.spread_ms for timing in each),
        )
        for each in zip(*runs, strict=True)
    ]
    return found, _disagreement(runs)


def _disagreement(runs: Sequence[Sequence[Timing]]) -> float:
    """Return by how much the nearest two times of a module differ, of the one least sure."""
    found = []
    for each in zip(*runs, strict=True):
        medians = sorted(timing.median_ms for timing in each)
        found.append(min(high / low - 1 for low, high in itertools.pairwise(medians)))
    return max(found, default=0.0)


def mean_times(
    backend: LatencyBackend, modules: Sequence[tuple[nn.Module, Tensor]], seconds: float
) -> list[float]:
    """Time modules in turn until their means are sure to half a percent on average.

    Of a machine that has a faster and a slower state, the median of all tells which of them a
    module saw a little more of; the mean, how much of each.

    Args:
        backend: that measures.
        modules: each with its input.
        seconds: after as long they are not timed once more, however unsure their means are.

    Returns:
        The mean over several times of each module's median, in milliseconds.
    """
    start = time.perf_counter()
    runs: list[list[float]] = []
    while len(runs) < _RUNS or (_doubt(runs) > _SURE and time.perf_counter() - start < seconds):
        runs.append([timing.median_ms for timing in backend.time(modules)])
    return [statistics.fmean(medians) for medians in zip(*runs, strict=True)]


def _doubt(runs: Sequence[Sequence[float]]) -> float:
    """Return the standard error of modules' means over runs, a share of them, on average."""
    errors = [
        statistics.stdev(medians) / math.sqrt(len(medians)) / statistics.fmean(medians)
        for medians in zip(*runs, strict=True)
    ]
    return statistics.fmean(errors)
