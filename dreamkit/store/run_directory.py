"""The run directory: one recipe's results, and the proof of which recipe that was."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from dreamkit.errors import RunDirectoryError
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.store.lock import LOCK, OWNER, RunInUse, RunLock
from dreamkit.types import RunContext

RECIPE = "recipe.resolved.yaml"
REPORT = "report.json"
_ELSEWHERE = "choose another folder with --out"


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
            source = f"application.images={{source: dreams, path: {folder}}}"
            dreams = (folder / RunContext.DREAMS).is_dir()
            raise RunDirectoryError(
                f"{folder} already holds the run of another recipe (its {RECIPE} differs); "
                f"{_ELSEWHERE}, or remove it"
                + (f". Its dreams can be used again: {source}" if dreams else "")
            )
        try:
            own = {LOCK, OWNER}
            foreign = (
                present is None
                and folder.is_dir()
                and any(entry.name not in own for entry in folder.iterdir())
            )
        except OSError as error:
            raise RunDirectoryError(
                f"{folder} cannot be read: {error.strerror}; {_ELSEWHERE}"
            ) from error
        if foreign:
            raise RunDirectoryError(f"{folder} is not empty and not a run; {_ELSEWHERE}")
        self.recipe_yaml = recipe_yaml
        self.started = present is not None
        self._lock = RunLock(folder)

    def claim(self) -> str | None:
        """Make the folder, lock it and write the recipe into it.

        Returns:
            What process ended in it without giving it back, as ``RunLock.acquire`` tells.

        Raises:
            RunDirectoryError: another process runs in it, or it cannot be written to; nothing is
                left behind then.
        """
        missing = [f for f in (self.folder, *self.folder.parents) if not f.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._lock.acquire()
            write_atomically(self.folder / RECIPE, self.recipe_yaml.encode())
        except RunInUse:
            raise
        except (OSError, RunDirectoryError) as error:
            self.release()
            for folder in missing:
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, RunDirectoryError):
                raise
            raise RunDirectoryError(
                f"{self.folder} cannot be made: {error.strerror}; {_ELSEWHERE}"
            ) from error
        return before

    def release(self) -> None:
        """Let other processes run in the folder."""
        self._lock.release()

    def withdraw(self) -> None:
        """Give up a claim of this process whose run came to nothing.

        Without dreams, checkpoints, measurements or a student what lies in the folder is records
        of the failure, and the mended recipe may use it. Else the same recipe may go on there.
        """
        if not self.folder.is_dir():  # it vanished, which may be why the run failed
            return
        inside = any(path.is_file() for path in self.folder.glob("*/**/*"))
        if not self.started and not inside and not (self.folder / RunContext.TABLE).is_file():
            shutil.rmtree(self.folder)

    def recipe(self) -> str | None:
        """Return the resolved recipe that claimed the folder, if one did."""
        try:
            return (self.folder / RECIPE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "its recipe is damaged"
            raise RunDirectoryError(
                f"{self.folder} cannot be used: {reason}; {_ELSEWHERE}"
            ) from error

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
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirectoryError(f"{folder} holds no finished run (no {REPORT})") from error
    except ValueError as error:
        raise RunDirectoryError(f"{folder / REPORT} is damaged; remove it to run again") from error
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict):
        raise RunDirectoryError(f"{folder / REPORT} is damaged; remove it to run again")
    return report
