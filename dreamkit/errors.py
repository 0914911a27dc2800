"""Errors that are the user's to fix: one clear message, exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

RecipePath = tuple[str | int, ...]
"""Where a value stands in a recipe, e.g. ``("synthesis", "regularizers", 1, "weight")``."""


class DreamkitError(Exception):
    """A mistake or a condition outside the program that the user can put right.

    Args:
        message: what is wrong and how to fix it, in one or a few lines.
        path: the place in the recipe it concerns, where there is one.
    """

    def __init__(self, message: str, path: RecipePath = ()) -> None:
        super().__init__(message)
        self.message = message
        self.path = path


class RecipeError(DreamkitError):
    """One or more problems in a recipe; the message lists every one of them."""


class OptionError(ValueError):
    """Raised by an entry's constructor when one of its options cannot stand.

    The recipe reader adds file, line and column of that option.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class MissingPath(OptionError):
    """Raised for a file or folder that is not there: the recipe is sound, this machine lacks it."""


class TeacherMismatch(DreamkitError):
    """An entry asks of the teacher what its architecture does not have."""


class NonFiniteLoss(DreamkitError):
    """A batch of dreams came to nothing: its loss overflowed."""


class OutOfMemory(DreamkitError):
    """Memory could not be had; the message says which option asks for less."""


class WeightsUnavailable(DreamkitError):
    """Pretrained weights could not be downloaded."""


class WeightsMismatch(DreamkitError):
    """A state dict does not fit the model it is loaded into."""


class RunDirectoryError(DreamkitError):
    """The output folder cannot be used for this run."""


class StoreError(DreamkitError):
    """A dream store is damaged or belongs to other settings."""


class ArtifactError(DreamkitError):
    """A saved student cannot be loaded."""


class NothingToPrune(DreamkitError):
    """No channel can be removed; the message names the groups and the reasons."""


class DuplicateEntry(DreamkitError):
    """Two providers registered the same name."""


class PluginError(DreamkitError):
    """A plugin that the recipe asks for cannot be loaded."""


@contextlib.contextmanager
def placed(*path: str | int, always: bool = True) -> Iterator[None]:
    """Put ``path`` before the place of any error raised in the block.

    What an entry raises is placed relative to its own options; who holds the entry adds where it
    stands. With ``always`` false, errors that concern no option stay without a place.
    """
    try:
        yield
    except DreamkitError as error:
        if always or error.path:
            error.path = (*path, *error.path)
        raise


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest choice, else ``""``."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which ``pip install`` brings it.

    Raises:
        DreamkitError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DreamkitError(
            f"this needs the package '{module.partition('.')[0]}', which is not installed: "
            f'pip install "dreamkit[{extra}]"'
        ) from error
