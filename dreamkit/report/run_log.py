"""A run's records, notes and progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from dreamkit import distributed
from dreamkit.errors import RunDirectoryError
from dreamkit.report.progress import Stages
from dreamkit.types import Event, Noted, Recorded, RunContext
from dreamkit.wording import say


class ConsoleLog:
    """Keeps what a run tells, but its records; shows notes and progress where there is a console.

    Args:
        console: where people look; None for silence.
        stopping: tells whether the run is to stop.

    Attributes:
        metrics: dotted names to numbers.
        details: anything else worth keeping.
        failures: what was asked for and not reached.
        notes: what the user must know, in the order in which it was said.
        seconds: spent in each stage.
        stages: that the run is in.
    """

    def __init__(
        self, console: Console | None = None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.console = console
        self.stopping = stopping
        self.metrics: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.stages = Stages(console)
        self._listeners: list[Callable[[Event], object]] = []

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Tell a listener of every event from now on; it is to raise nothing."""
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Tell the listeners of an event."""
        for listener in self._listeners:
            listener(event)

    def note(self, text: str) -> None:
        """Show a note at once and keep it for the report; what was said before is not repeated."""
        if text in self.notes:
            return
        self.notes.append(text)
        if self.console is not None:
            say(self.console, f"note: {text}")
            self.stages.spoke()
        self.emit(Noted(text=text))

    def check(self, together: bool = False) -> None:
        """Raise KeyboardInterrupt if the run is to stop, on any rank where they are together."""
        if distributed.anywhere(self.stopping()) if together else self.stopping():
            raise KeyboardInterrupt

    @contextmanager
    def progress(self, stage: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
        """Show a bar with the time left on a terminal, a line every few seconds elsewhere.

        Stages may lie one within the other.
        """
        start = self.stages.clock()
        try:
            with self.stages.stage(stage, total, before) as advance:
                yield advance
        finally:
            seconds = self.stages.clock() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class MemoryLog(ConsoleLog):
    """Keeps everything in memory.

    Args:
        console: where people look; None for silence.
        stopping: tells whether the run is to stop.

    Attributes:
        records: by stage and step.
    """

    def __init__(
        self, console: Console | None = None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(console, stopping)
        self.records: dict[str, dict[int, dict[str, float | None]]] = {}

    def begin(self, stage: str) -> None:
        """Forget what was recorded under a stage that starts afresh."""
        self.records.pop(stage, None)

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Keep one point of a stage's curves; a number that is not finite becomes None."""
        finite = _finite(numbers)
        self.records.setdefault(stage, {})[step] = finite
        self.emit(Recorded(stage=stage, step=step, numbers=finite))


class FileLog(ConsoleLog):
    """Writes records to ``log.jsonl``, however many they are; ``read_records`` returns them.

    The file is opened by ``open``, or by the first record.

    Args:
        folder: the run directory; an earlier part of the same run is continued.
        console: where people look.
        stopping: tells whether the run is to stop.
    """

    def __init__(
        self, folder: Path, console: Console, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(console, stopping)
        self.path = folder / RunContext.LOG
        self._file: TextIO | None = None

    def open(self) -> None:
        """Open ``log.jsonl``, mending a line that a crash cut short; the first rank alone does.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        if not distributed.is_first():
            return
        try:
            cut_short = self.path.is_file() and self.path.read_bytes()[-1:] not in {b"", b"\n"}
            self._file = self.path.open("a", encoding="utf-8")
            if cut_short:  # by a crash: what follows must not be lost with it
                self._file.write("\n")
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close ``log.jsonl``."""
        if self._file is not None:
            self._file.close()

    def begin(self, stage: str) -> None:
        """Mark that a stage starts afresh; readers forget its earlier records."""
        self._write({"stage": stage, "begin": True})

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write one line; numbers that are not finite are written as null."""
        finite = _finite(numbers)
        self._write({"stage": stage, "step": step, "numbers": finite})
        self.emit(Recorded(stage=stage, step=step, numbers=finite))

    def _write(self, line: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        if self._file is None:
            self.open()
        assert self._file is not None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunDirectoryError(
                f"the log in {self.path.parent} cannot be written: {error.strerror}; what was "
                "finished is kept"
            ) from error


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: (value if math.isfinite(value) else None) for name, value in numbers.items()}


def read_records(folder: Path) -> dict[str, dict[int, dict[str, float | None]]]:
    """Return the records of ``log.jsonl`` by stage: numbers by step, in order.

    A step that a resumed run did again counts once, as it was the last time; a line cut short by
    a crash is passed over.
    """
    stages: dict[str, dict[int, dict[str, float | None]]] = {}
    for text in (folder / RunContext.LOG).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("begin"):
            stages.pop(line["stage"], None)
        else:
            stages.setdefault(line["stage"], {})[line["step"]] = line["numbers"]
    return {name: dict(sorted(steps.items())) for name, steps in stages.items()}
