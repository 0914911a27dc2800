"""Events: what happened in a run, for those who listen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run. New kinds and new fields may come: match by class."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins, or goes on; everything that its recipe names is loaded.

    Args:
        folder: the run directory; None for a run in memory.
        recipe: the resolved recipe as plain data.
        resumed: whether it goes on with what an interrupted run left.
    """

    folder: Path | None
    recipe: Mapping[str, Any]
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchDreamed(Event):
    """A batch of dreams is finished.

    Args:
        index: of the batch, from 0.
        images: stored images (N, C, H, W) uint8, on the CPU.
        labels: (N,) int64, the classes that they are to show.
        loss: the best one of the batch.
    """

    index: int
    images: Tensor
    labels: Tensor
    loss: float


@dataclass(frozen=True, kw_only=True)
class DreamsPictured(Event):
    """The picture of the dreams so far is drawn anew: now and then, and after batches.

    Args:
        path: where it lies.
        png: what the file holds.
    """

    path: Path
    png: bytes


@dataclass(frozen=True, kw_only=True)
class RoundPruned(Event):
    """A round of pruning is finished.

    Args:
        round: its number, from 1.
        numbers: what its record holds, such as ``removed_channels`` and the ``flops`` left, a
            share in [0, 1].
    """

    round: int
    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Recorded(Event):
    """A record was written to the run's log.

    Args:
        stage: what was going on, such as ``training``.
        step: of the stage.
        numbers: dotted names to numbers; one that is not finite is None.
    """

    stage: str
    step: int
    numbers: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Noted(Event):
    """The user was told something.

    Args:
        text: what.
    """

    text: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """A run came to its end, and its report is written.

    Args:
        report: what ``report.json`` holds.
    """

    report: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """A run ended without a report.

    Args:
        error: why; ``KeyboardInterrupt`` for one that was stopped.
    """

    error: BaseException
