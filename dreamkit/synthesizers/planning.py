"""Before dreaming: how many images together, what a run will cost, and if compiling it pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from dreamkit.memory import peak_memory
from dreamkit.synthesizers.engine import EXPECTED_SPEEDUP, Engine, Evaluator
from dreamkit.synthesizers.stage import LARGE
from dreamkit.types import Estimate, OnStep, Teacher
from dreamkit.wording import duration

TIMED_SECONDS = 1.0
"""How long the steps of a phase are timed for, or until ``StepClock.most_steps`` are done."""
SMALL_BATCH, LARGE_BATCH = 64, 32
"""Images of a batch below ``LARGE``, and from it on: more would fill a laptop's memory."""


@dataclass(frozen=True)
class Phase:
    """Steps of one kind within a batch, such as a stage of an inversion.

    Args:
        steps: how many a batch takes, or as many as they are worth in time.
        run: takes this many steps, throws them away and calls back after each of them.
        images: what is evaluated in each, for the compiler to look at.
        labels: of these images.
        colours: that networks see them in, where these are not their own.
    """

    steps: float
    run: Callable[[int, OnStep], None]
    images: Tensor
    labels: Tensor
    colours: Tensor | None = None


def default_batch(teacher: Teacher) -> int:
    """Return how many images are dreamed together of those that a teacher takes."""
    _, height, width = teacher.card.input_size
    return SMALL_BATCH if min(height, width) < LARGE else LARGE_BATCH


def prepare(
    engine: Engine,
    evaluator: Evaluator,
    phases: Sequence[Phase],
    batches: float,
    compile_seconds: float,
    note: Callable[[str], None],
) -> tuple[Engine, Estimate]:
    """Time a few steps of every phase, compile if that pays, and estimate the cost.

    Args:
        engine: how to compute.
        evaluator: computes; compiled afterwards, or not.
        phases: what a full batch consists of.
        batches: how many batches are to come.
        compile_seconds: what compiling for one shape is expected to take.
        note: told what was decided.

    Returns:
        The engine with that decided, and seconds for all batches, compilation included, with the
        peak memory of a step.
    """
    device = evaluator.device
    with peak_memory(device) as peak:
        eager = _seconds_a_batch(phases, device)
    estimate = Estimate(batches * eager, peak.total)
    chosen_here = engine.compile == "auto"
    cost = len({tuple(phase.images.shape) for phase in phases}) * compile_seconds
    if chosen_here:
        engine = replace(engine, compile=_pays(estimate.seconds, cost, evaluator, note))
    if engine.compile is not True:
        return engine, estimate
    note(f"compiling the inversion: about {duration(cost)}")
    start = time.perf_counter()
    problem, compiled = compile_phases(evaluator, phases), eager
    spent = time.perf_counter() - start
    if problem is None:
        with peak_memory(device) as peak:
            compiled = _seconds_a_batch(phases, device)
        if chosen_here and compiled > eager:
            problem = "compiled, it is slower"
    if problem is not None:
        evaluator.discard_compiled()
        note(f"inversion runs without compilation: {problem}")
        return replace(engine, compile=False), estimate
    note(f"inversion compiled in {spent:.0f} s: {eager / compiled:.1f} times as fast")
    memory = peak.total
    if device.type == "cuda":
        # A graph's memory was allocated as it was recorded, and replaying it allocates none.
        memory = max(memory, estimate.memory_bytes)
    return engine, Estimate(spent + batches * compiled, memory)


def _pays(seconds: float, cost: float, evaluator: Evaluator, note: Callable[[str], None]) -> bool:
    """Whether compiling, at a cost in seconds, saves more; noted if it saves any, and not."""
    kind = evaluator.device.type
    saved = seconds * (1 - 1 / EXPECTED_SPEEDUP.get(kind, EXPECTED_SPEEDUP["cpu"]))
    if evaluator.best_eager:
        if saved > cost:
            note(
                "inversion runs without compilation: compiled, strided depthwise convolutions in "
                "bfloat16 are slower"
            )
        return False
    if 1 <= saved <= cost:
        note(
            f"inversion runs without compilation: compiling takes about {cost:.0f} s and "
            f"would save about {saved:.0f} s"
        )
    return saved > cost


def compile_phases(evaluator: Evaluator, phases: Sequence[Phase]) -> str | None:
    """Compile for full batches of every phase; return why that did not work, if so."""
    for phase in phases:
        problem = evaluator.compile(phase.images, phase.labels, phase.colours)
        if problem is not None:
            return problem
    return None


def _seconds_a_batch(phases: Sequence[Phase], device: torch.device) -> float:
    return sum(phase.steps * _seconds_a_step(phase, device) for phase in phases)


def _seconds_a_step(phase: Phase, device: torch.device) -> float:
    clock = StepClock(device)
    with suppress(TimedEnough):
        phase.run(clock.most_steps, clock)
    return clock.seconds


class TimedEnough(Exception):
    """Ends steps that are only taken for the time that they take."""


class StepClock:
    """Times steps, as their ``on_step``, without the first ones.

    Those also load kernels and, compiled on a GPU, record graphs.

    Args:
        device: waited for after every step.
    """

    most_steps = 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_steps = 1 if device.type == "cpu" else 4
        self.times: list[float] = []

    def __call__(self, done: int, terms: Mapping[str, Tensor]) -> None:
        """Note the time; raise ``TimedEnough`` once there is enough of it."""
        float(terms["loss"])  # waits for the device
        self.times.append(time.perf_counter())
        timed = len(self.times) - self.warm_steps
        if timed > 0 and self.times[-1] - self.times[self.warm_steps - 1] > TIMED_SECONDS:
            raise TimedEnough

    @property
    def seconds(self) -> float:
        """The median over the steps that count."""
        counted = self.times[self.warm_steps - 1 :]
        return median(after - before for before, after in pairwise(counted))
