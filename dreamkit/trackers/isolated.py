"""Trackers that a run goes on without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dreamkit.isolation import Isolated
from dreamkit.types import Event, Recorded, RunFinished, RunStarted, Tracker


class IsolatedTrackers:
    """A run's trackers as one; one that raises is named once and left out.

    Args:
        trackers: the recipe's.
        note: told who is left out, and why.
    """

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self._open = list(trackers)
        named = [(f"the tracker {type(tracker).__name__}", tracker) for tracker in trackers]
        self._trackers = Isolated(named, note)

    def hear(self, event: Event) -> None:
        """Pass on what trackers are told of a run's events."""
        if isinstance(event, RunStarted) and event.folder is not None:
            self.start(event.folder, event.recipe, event.resumed)
        elif isinstance(event, Recorded):
            self.record(event.stage, event.step, event.numbers)
        elif isinstance(event, RunFinished):
            self.finish(event.report["metrics"])

    def start(self, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        """Begin a run; the arguments are those of ``Tracker.start``."""
        self._trackers.each(lambda tracker: tracker.start(folder, recipe, resumed))

    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Pass one record on."""
        self._trackers.each(lambda tracker: tracker.record(stage, step, numbers))

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Pass the final metrics on."""
        self._trackers.each(lambda tracker: tracker.finish(metrics))

    def withdraw(self) -> None:
        """Have every tracker that works remove what it wrote."""
        self._trackers.each(lambda tracker: tracker.withdraw())

    def close(self) -> None:
        """Close every tracker, those that failed too; a second call does nothing."""
        fit = {id(tracker) for tracker in self._trackers.left}
        opened, self._open = self._open, []
        for tracker in opened:
            if id(tracker) not in fit:  # it was named already
                with suppress(Exception, SystemExit):
                    tracker.close()
        if opened:
            self._trackers.each(lambda tracker: tracker.close())
