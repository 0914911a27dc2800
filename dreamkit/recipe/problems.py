"""What pydantic found wrong, in a user's words and at the path where the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from dreamkit.errors import MissingPath, OptionError, RecipePath, did_you_mean
from dreamkit.recipe.yaml_nodes import NOWHERE, Position, type_name

_WANTED = dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "a list")
_WANTED |= dict.fromkeys(("dict_type", "dataclass_type"), "a mapping")
_WANTED["path_type"] = "a path"
TOO_FEW = "too few values"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a value, or with the key it stands under where that is unknown.

    Args:
        path: what it concerns.
        message: what is wrong and how to mend it.
        missing: the data are sound, but a file they name is not on this machine.
        unknown: there is no option of this name.
        place: where it was written, if in a file.
    """

    path: RecipePath
    message: str
    missing: bool = False
    unknown: bool = False
    place: Position = NOWHERE

    def __str__(self) -> str:
        where = located(self.place, self.path)
        return f"{where}: {self.message}" if where else self.message


def format_path(path: RecipePath) -> str:
    """Write a path as ``synthesis.regularizers[1].weight``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def located(place: Position, path: RecipePath) -> str:
    """Write where a value was written and what it is: ``r.yaml:3:11 synthesis.images``.

    Of what was written by ``--set synthesis.images=...`` the place is the value's path already.
    """
    name = format_path(path)
    if place == NOWHERE:
        return name
    if f"--set {name}".startswith(str(place)):
        return f"--set {name}"
    return f"{place} {name or 'recipe'}"


def problems_of(error: ValidationError, data: Any, known: dict[int, set[str]]) -> list[Problem]:
    """Return every problem, those that concern one place in one line.

    Args:
        error: what pydantic raised.
        data: what was validated.
        known: the options that each mapping of the data (by its id) may have.
    """
    merged: dict[RecipePath, dict[str, Problem]] = {}
    for line in error.errors(include_url=False):
        problem = _problem(line, data, known)
        merged.setdefault(problem.path, {}).setdefault(problem.message, problem)
    found = []
    for path, problems in merged.items():
        inside = [m for p in merged if p[: len(path)] == path != p for m in merged[p]]
        if not inside or _tell_more(inside, list(problems)):
            # A union reports a problem for each of its branches.
            *others, last = problems.values()
            message = ", or ".join(
                [*(p.message.partition(" (got ")[0] for p in others), last.message]
            )
            found.append(replace(last, message=message))
    return found


def _tell_more(inside: list[str], messages: list[str]) -> bool:
    """Return whether a value's problems say more than those inside it: something is missing.

    An option is not missing where the one inside is its misspelling.
    """
    if TOO_FEW in messages:
        return True
    missing = [m.split("'")[1] for m in messages if m.endswith("is missing")]
    return any(not any(f"mean '{name}'" in m for m in inside) for name in missing)


def _problem(line: Any, data: Any, known: dict[int, set[str]]) -> Problem:
    path, parent, value = _written(data, line["loc"])
    kind, given, last = line["type"], line["input"], ("", *line["loc"])[-1]
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        options = sorted(known.get(id(parent), ()))
        hint = did_you_mean(str(last), options) or f" (options: {', '.join(options) or 'none'})"
        return Problem(path, f"unknown option{hint}", unknown=True)
    if kind == "missing":
        named = isinstance(last, str)
        return Problem(path, f"the option '{last}' is missing" if named else TOO_FEW)
    error = line.get("ctx", {}).get("error")
    if isinstance(error, OptionError):
        # An entry written as its bare name has no key that holds the name.
        bare = not isinstance(value, dict) and error.option in {"name", "source"}
        where = path if bare else (*path, error.option)
        return Problem(where, str(error), isinstance(error, MissingPath))
    if kind in _WANTED:
        message = f"should be {_WANTED[kind]}, not {type_name(given)}"
    elif kind == "float_type" and type(given) is int:  # beyond the largest float
        message = "should be a finite number"
    else:
        message = line["msg"].removeprefix("Value error, ").replace("Input should", "should")
        message = message.replace("Tuple", "a list")
    shown = isinstance(given, str | int | float) or (given is None and "null" not in message)
    return Problem(path, message + (f" (got {_short(given)})" if shown else ""))


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a very long number"
    return text if len(text) < 100 else f"{text[:97]}..."


def _written(data: Any, location: tuple[str | int, ...]) -> tuple[RecipePath, Any, Any]:
    """Return the steps of a location that the data have, what holds the last, and what it leads to.

    Pydantic adds the branches of unions. A mapping of weights is validated as a list.
    """
    path: list[str | int] = []
    parent = data
    for step in location:
        inside = data
        if isinstance(inside, dict) and isinstance(step, int):
            if {"name", "source"} & inside.keys():
                continue  # one entry, validated as a list of one
            if step < len(inside):
                step = list(inside)[step]
        is_key = isinstance(inside, dict) and step in inside
        if is_key or (isinstance(inside, list | tuple) and step in range(len(inside))):
            parent, data = inside, inside[step]
            path.append(step)
    return tuple(path), parent, data
