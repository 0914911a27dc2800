"""The run directory: one recipe's results, and the proof of which recipe that was."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dreamkit.errors import RecipeError, RecipePath, RunDirectoryError
from dreamkit.recipe.problems import format_path
from dreamkit.recipe.yaml_nodes import parse_yaml
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.store.dreams import holds_dreams, picture_of
from dreamkit.store.lock import LOCK, OWNER, RunInUse, RunLock
from dreamkit.types import RunContext
from dreamkit.wording import and_more

RECIPE = "recipe.resolved.yaml"
REPORT = "report.json"
PAGE = "report.html"
_PRESET = "# preset: "
"""Begins the first line of a recipe that a preset was laid on."""
_ELSEWHERE = "choose another folder with --out"


class RunDirectory:
    """A folder for the run of one resolved recipe; nothing is written before ``claim``.

    Args:
        folder: need not exist.
        recipe_yaml: the recipe as it runs, with every default: what a run goes on from was made
            with all of it.
        preset: which one was laid on, for the report of a run that is gone on with.

    Raises:
        RunDirectoryError: the folder holds another recipe's run or other files.
    """

    def __init__(self, folder: Path, recipe_yaml: str, preset: str | None = None) -> None:
        self.folder = folder
        present = self.recipe()
        if present is not None and _without_preset(present) != recipe_yaml:
            source = f"application.images={{source: dreams, path: {folder}}}"
            dreams = (folder / RunContext.DREAMS).is_dir()
            raise RunDirectoryError(
                f"{folder} already holds the run of another recipe (its {RECIPE} differs"
                f"{_differing(_without_preset(present), recipe_yaml)}); {_ELSEWHERE}, or remove it"
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
        self.recipe_yaml = recipe_yaml if preset is None else f"{_PRESET}{preset}\n{recipe_yaml}"
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

    def withdraw(self, others: Callable[[], object] = lambda: None) -> None:
        """Give up a claim of this process whose run came to nothing.

        Without dreams, checkpoints, measurements or a student what the run wrote is records of the
        failure: they are removed, and the mended recipe may use the folder. Else the same recipe
        may go on there. Files of others stay, and the folder with them.

        Args:
            others: called where the run's records go; removes what else it wrote beside them.
        """
        if self.started:
            return
        for picture in self.folder.glob(f"**/{picture_of(Path(RunContext.DREAMS))}"):
            if not holds_dreams(picture.with_suffix("")):  # of a batch that was never finished
                picture.unlink(missing_ok=True)
        if self._holds_work():
            return
        others()
        for name in (RECIPE, RunContext.LOG, PAGE):
            (self.folder / name).unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*/**/"), reverse=True):
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()
        if {path.name for path in self.folder.glob("*")} <= {LOCK, OWNER}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _holds_work(self) -> bool:
        """Whether the folder has more than records: dreams, measurements and the like."""
        table = self.folder / RunContext.TABLE
        return table.is_file() or any(path.is_file() for path in self.folder.glob("*/**/*"))

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


def stored_preset(folder: Path) -> str | None:
    """Return the preset that was laid on the recipe that runs in a folder."""
    text = (folder / RECIPE).read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    return first.removeprefix(_PRESET) if first.startswith(_PRESET) else None


def _without_preset(recipe: str) -> str:
    return recipe.partition("\n")[2] if recipe.startswith(_PRESET) else recipe


def _differing(one: str, other: str) -> str:
    """Return which options of two recipes differ, as a part of a sentence."""
    try:
        found = [dict(_flat(parse_yaml(text, RECIPE).plain(), ())) for text in (one, other)]
    except RecipeError:  # it is damaged, or no recipe
        return ""
    names = [p for p in dict.fromkeys([*found[0], *found[1]]) if found[0].get(p) != found[1].get(p)]
    return f" in {and_more([format_path(name) for name in names])}" if names else ""


def _flat(value: Any, path: RecipePath) -> Iterator[tuple[RecipePath, Any]]:
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    steps: Iterable[tuple[str | int, Any]]
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    for step, inner in steps:
        yield from _flat(inner, (*path, step))


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
