"""The run directory: one recipe's results, and the proof of which recipe that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamkit.errors import RunDirectoryError
from dreamkit.store.atomic import write_atomically, write_json

RECIPE = "recipe.resolved.yaml"
REPORT = "report.json"


class RunDirectory:
    """A folder for the run of one resolved recipe; nothing is written before ``claim``.

    Args:
        folder: need not exist.
        recipe_yaml: the recipe as it runs.

    Raises:
        RunDirectoryError: the folder holds another recipe's run or other files.
    """

    def __init__(self, folder: Path, recipe_yaml: str) -> None:
        self.folder = folder
        present = self.recipe()
        if present is not None and present != recipe_yaml:
            raise RunDirectoryError(
                f"{folder} already holds the run of another recipe (its {RECIPE} differs); "
                "choose another folder with --out, or remove it"
            )
        if present is None and folder.is_dir() and any(folder.iterdir()):
            raise RunDirectoryError(
                f"{folder} is not empty and not a run; choose another folder with --out"
            )
        self.recipe_yaml = recipe_yaml
        self.started = present is not None

    def claim(self) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            RunDirectoryError: the folder cannot be written to; nothing is left behind then.
        """
        made = not self.folder.is_dir()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.folder} cannot be made: {error.strerror}; choose another folder with --out"
            ) from error
        try:
            write_atomically(self.folder / RECIPE, self.recipe_yaml.encode())
        except RunDirectoryError:
            if made:
                self.folder.rmdir()
            raise

    def recipe(self) -> str | None:
        """Return the resolved recipe that claimed the folder, if one did."""
        try:
            return (self.folder / RECIPE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDirectoryError(f"{self.folder} cannot be read: {error.strerror}") from error

    @property
    def finished(self) -> bool:
        """Whether the run's report has been written."""
        return (self.folder / REPORT).is_file()

    def write_report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``, which marks the run as finished."""
        write_json(self.folder / REPORT, report)


def read_report(folder: Path) -> dict[str, Any]:
    """Read a finished run's ``report.json``.

    Raises:
        RunDirectoryError: there is none.
    """
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirectoryError(f"{folder} holds no finished run (no {REPORT})") from error
    return report
