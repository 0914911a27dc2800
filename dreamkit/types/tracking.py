"""Trackers: where a run's records go besides its own log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker(ABC):
    """An entry of ``trackers``: where the records of a run are sent besides ``log.jsonl``.

    It is called in the order ``start``, ``record`` (many times), ``finish``, ``close``. What it
    raises ends neither the run nor its report: it is named once and not called again, but for
    ``close`` and ``withdraw``.
    """

    def start(self, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        """Begin a run.

        Args:
            folder: the run directory.
            recipe: the resolved recipe as plain data.
            resumed: whether an earlier part of the same run was recorded already.
        """

    @abstractmethod
    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Take one record; a number that is not finite comes as None."""

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Take the final metrics of a run that came to its end; its report is written by then."""

    def close(self) -> None:
        """Let go of what is open. It is called once on every way out: the end, errors, Ctrl-C."""

    def withdraw(self) -> None:
        """Remove what it wrote into the run directory: the run failed with nothing to keep.

        It is called after ``close``. A file that stays keeps the folder from other recipes.
        """
