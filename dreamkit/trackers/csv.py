"""Records as a table for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamkit.errors import OptionError
from dreamkit.types import Tracker


@dataclass
class CSVTracker(Tracker):
    """Write every number of a run to ``log.csv``: stage, step, name, value.

    Args:
        file: name of the file in the run directory.
    """

    file: str = "log.csv"

    def __post_init__(self) -> None:
        path = Path(self.file)
        if path.name != self.file or path.suffix != ".csv":
            raise OptionError("file", "should be a name ending in .csv, without folders")
        self._path: Path | None = None

    def start(self, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        """Begin the file; a resumed run adds to it."""
        self._path = folder / self.file
        if not (resumed and self._path.is_file()):
            self._write([("stage", "step", "name", "value")], "w")

    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Write one record's numbers."""
        self._write([(stage, step, name, value) for name, value in numbers.items()])

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write the final metrics under the stage ``final``."""
        self._write([("final", 0, name, value) for name, value in metrics.items()])

    def withdraw(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, rows: list[tuple[Any, ...]], mode: Literal["a", "w"] = "a") -> None:
        assert self._path is not None, "start comes first"
        with self._path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
