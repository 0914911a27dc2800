"""Records as a table for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamkit.errors import OptionError


@dataclass
class CSVTracker:
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

    def start(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Begin the file; a resumed run adds to it."""
        self._path = folder / self.file
        if not self._path.is_file():
            self._write([("stage", "step", "name", "value")])

    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Write one record's numbers."""
        self._write([(stage, step, name, value) for name, value in numbers.items()])

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write the final metrics under the stage ``final``."""
        self._write([("final", 0, name, value) for name, value in metrics.items()])

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        assert self._path is not None, "start comes first"
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
