"""A run: where applications work, report what they do, and leave what they come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from dreamkit.copying import copied
from dreamkit.types.channels import ChannelRule
from dreamkit.types.events import Event
from dreamkit.types.images import Images
from dreamkit.types.inversion import Synthesis
from dreamkit.types.latency import LatencyBackend
from dreamkit.types.models import Teacher


class RunLog(Protocol):
    """Where an application reports what it does and what it finds.

    ``metrics`` maps dotted names to numbers (accuracies in [0, 1], latencies in ms), ``details``
    holds anything else worth keeping, and ``failures`` what was asked for and not reached.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    failures: list[str]

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Add one point to the curves of a stage."""

    def begin(self, stage: str) -> None:
        """Forget what an interrupted try recorded under a stage that starts afresh."""

    def note(self, text: str) -> None:
        """Say something the user must know, once; it also stands in the report."""

    def progress(
        self, stage: str, total: int, before: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show progress of ``total`` units; the callable takes how many are done. Times it.

        Args:
            stage: what it is called.
            total: units in all.
            before: of these, done by an interrupted try.
        """

    def emit(self, event: Event) -> None:
        """Tell those who listen, plugins and trackers, what happened."""

    def check(self, together: bool = False) -> None:
        """Raise KeyboardInterrupt if the run is to stop; call it where nothing is lost by that.

        Args:
            together: every rank comes here, and stops if one is to.
        """


@dataclass(frozen=True)
class RunContext:
    """Where an application works, and whom it tells.

    Args:
        seed: of everything random.
        device: where models work.
        folder: keeps dreams, checkpoints and latency tables, from which an interrupted run goes on.
        log: takes records, notes, progress and metrics.
        latency: times models on the target; asked only where a criterion or a goal needs it.
        evaluation: real images, None where there are none.
        channel_rules: how layers and operations treat channels, beside those known to pruning.
    """

    seed: int
    device: torch.device
    folder: Path
    log: RunLog
    latency: LatencyBackend
    evaluation: Images | None = None
    channel_rules: tuple[ChannelRule, ...] = ()

    DREAMS: ClassVar[str] = "dreams"
    STUDENT: ClassVar[str] = "student"
    QUANTIZED: ClassVar[str] = "quantized"
    CHECKPOINTS: ClassVar[str] = "checkpoints"
    TABLE: ClassVar[str] = "latency_lut.json"
    LOG: ClassVar[str] = "log.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What an application came to, beside what it told the log.

    Args:
        student: the network that it made, on the run's device, in eval mode; None if it makes none.
        images: what the student was made on, or what was dreamed or judged.
        same_layers: earlier states of the student that have its layers, so that they cost what
            it does, e.g. ``("pruned",)``.
    """

    student: Teacher | None = None
    images: Images | None = None
    same_layers: tuple[str, ...] = ()


class Application(ABC):
    """An entry of ``applications``: what is done with a teacher and images."""

    images_option: ClassVar[str] = "images"
    """The option that names where images come from: a source, or None for the run's own dreams."""

    @property
    def needs_synthesis(self) -> bool:
        """Whether it dreams; a recipe without ``synthesis`` is then refused."""
        return False

    @property
    def trains_student(self) -> bool:
        """Whether it dreams against a student in training, which ``make_student`` builds."""
        return False

    def make_student(self, teacher: Teacher, context: RunContext) -> Teacher:
        """Return the student as it is before its training, on the context's device.

        By default a copy of the teacher, as what is pruned or extended starts from.
        """
        return replace(teacher, model=copied(teacher.model))

    def planned(
        self, teacher: Teacher, synthesis: Synthesis, context: RunContext
    ) -> tuple[Synthesis, RunContext]:
        """Return what dreaming will come to, to be estimated, where it differs from these."""
        return synthesis, context

    @abstractmethod
    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Do the work.

        Args:
            teacher: on the context's device, in eval mode; left as it is.
            images: to work on, or how to dream them; None where its options ask for none.
            context: where to work, and whom to tell.
        """
