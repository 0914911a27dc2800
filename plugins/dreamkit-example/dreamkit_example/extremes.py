"""The least and the largest of each number of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamkit.plugin import Tracker

FILE = "extremes.json"


class Extremes(Tracker):
    """Write the least and the largest value of each recorded number to ``extremes.json``."""

    def __init__(self) -> None:
        self._range: dict[str, list[float]] = {}
        self._path: Path | None = None

    def start(self, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        """Take up what an earlier part of the run left."""
        self._path = folder / FILE
        if resumed and self._path.is_file():
            self._range = json.loads(self._path.read_text(encoding="utf-8"))

    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Widen the ranges."""
        for name, value in numbers.items():
            if value is not None:
                known = self._range.setdefault(f"{stage}.{name}", [value, value])
                known[:] = min(known[0], value), max(known[1], value)

    def close(self) -> None:
        """Write the file, on every way out of the run."""
        if self._path is not None:
            self._path.write_text(json.dumps(self._range, indent=1) + "\n", encoding="utf-8")
