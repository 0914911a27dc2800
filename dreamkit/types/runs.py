"""A run: where applications report what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from dreamkit.types.images import Images
from dreamkit.types.inversion import Synthesizer
from dreamkit.types.latency import LatencyBackend
from dreamkit.types.models import Teacher


class RunLog(Protocol):
    """Where an application reports what it does."""

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write one line to ``log.jsonl`` and to every tracker."""

    def begin(self, stage: str) -> None:
        """Forget what an interrupted try recorded under a stage that starts afresh."""

    def note(self, text: str) -> None:
        """Say something the user must know; it also stands in the report."""

    def progress(self, stage: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show progress of ``total`` units; the callable takes how many are done. Times it."""

    def check(self, together: bool = False) -> None:
        """Raise KeyboardInterrupt if the run is to stop; call it where nothing is lost by that.

        Args:
            together: every rank comes here, and stops if one is to.
        """


@dataclass
class RunContext:
    """What an application works with, and where it leaves its results.

    Args:
        recipe: the resolved recipe as plain data.
        seed: the recipe's.
        device: where models work.
        folder: the run directory.
        teacher: on ``device``, in eval mode.
        synthesizer: None where the recipe has none.
        evaluation: real images, None where the recipe has none.
        latency: times models on the target.
        log: records, notes and progress.
        metrics: dotted names to numbers; accuracies in [0, 1], latencies in ms.
        details: anything else worth keeping in ``report.json``.
        failures: what was asked for and not reached; the run is kept, and ends with status 1.
    """

    recipe: Mapping[str, Any]
    seed: int
    device: torch.device
    folder: Path
    teacher: Teacher
    synthesizer: Synthesizer | None
    evaluation: Images | None
    latency: LatencyBackend
    log: RunLog
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    DREAMS: ClassVar[str] = "dreams"
    STUDENT: ClassVar[str] = "student"
    CHECKPOINTS: ClassVar[str] = "checkpoints"
    TABLE: ClassVar[str] = "latency_lut.json"


class Application(Protocol):
    """An entry of ``applications``.

    ``needs_synthesis: bool`` says whether it dreams (a recipe without ``synthesis`` is refused),
    ``trains_student: bool``, where there is one, whether it dreams against a student in training;
    if so, ``make_student(context) -> Teacher`` builds that student, untrained. One that dreams
    otherwise than ``synthesis`` says has ``planned(context) -> RunContext``: its dreaming costs the
    same.
    """

    def run(self, context: RunContext) -> None:
        """Do the work; numbers go to ``context.metrics``, files to ``context.folder``."""
