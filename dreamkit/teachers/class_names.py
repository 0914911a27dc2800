"""The option ``class_names`` of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dreamkit.card import read_class_names
from dreamkit.errors import DreamkitError, MissingPath, OptionError


def names_of_classes(
    given: Sequence[str | int] | str | None, num_classes: int
) -> tuple[str, ...] | None:
    """Return the names of a teacher's classes, which a file may hold.

    Args:
        given: see ``read_class_names``.
        num_classes: of the teacher.

    Raises:
        OptionError: there is no such file, it does not name classes, or there are more or fewer.
    """
    if isinstance(given, str) and not Path(given).expanduser().is_file():
        raise MissingPath("class_names", f"no such file: {given}")
    try:
        names = read_class_names(Path(given) if isinstance(given, str) else given)
    except DreamkitError as error:
        raise OptionError("class_names", error.message) from error
    if names is not None and len(names) != num_classes:
        raise OptionError("class_names", f"{len(names)} names for {num_classes} classes")
    return names
