"""Objects from the options of a Python call: validated as in a recipe, with no file to point at."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from dreamkit.errors import RecipeError, RecipePath
from dreamkit.recipe.construct import Builder
from dreamkit.registry import Registries

T = TypeVar("T")


def build_entry(
    registries: Registries,
    kind: str,
    data: Any,
    path: RecipePath = (),
    function: Callable[..., Any] | None = None,
) -> Any:
    """Build one registry entry from plain data, validated as in a recipe.

    Args:
        registries: what entries there are.
        kind: of which kind the entry is.
        data: a mapping with its name and its options, or its name. Any value that stands for an
            object may be the object itself.
        path: what to call the data in messages; their options alone by default.
        function: that took the options as keywords, beside its own; one called ``method`` is the
            entry's name.

    Raises:
        RecipeError: every problem, one a line: the path of the option and the fix.
    """
    builder = Builder(registries)
    keywords = [] if function is None else keywords_of(function)
    return _built(builder, partial(builder.entry, kind), data, path, keywords)


def build_options(
    registries: Registries, cls: type[T], data: Mapping[str, Any], path: RecipePath = ()
) -> T:
    """Build an object of a class that is no entry from its options, as ``build_entry`` does.

    Raises:
        RecipeError: every problem, one a line: the path of the option and the fix.
    """
    builder = Builder(registries)
    made: T = _built(builder, partial(builder.construct, cls), data, path)
    return made


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """Return the names that a function takes as keywords alone."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _built(
    builder: Builder,
    make: Callable[[Any], Any],
    data: Any,
    path: RecipePath,
    keywords: Sequence[str] = (),
) -> Any:
    made, problems = builder.build(make, _plain(data), keywords)
    if problems:
        lines = []
        for problem in problems:
            called = problem.path
            if called == ("name",) and "method" in keywords:
                called = ("method",)
            said = _in_python(problem.message)
            lines.append(str(replace(problem, path=(*path, *called), message=said)))
        raise RecipeError("\n".join(lines))
    return made


def _in_python(message: str) -> str:
    """Return a message with Python's words for what YAML calls otherwise."""
    said, got, value = message.partition(" (got ")
    said = re.sub(r"\ba mapping\b", "a dict", said)
    return re.sub(r"\bnull\b", "None", said) + got + value


def _plain(data: Any) -> Any:
    """Return data with plain mappings and numbers in place of others' kinds of them."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if type(data) in {list, tuple}:
        return type(data)(_plain(value) for value in data)
    is_number = type(data).__module__ == "numpy" and getattr(data, "ndim", None) == 0
    return data.item() if is_number else data
