"""A recipe with every option written out, those that were left to their defaults too.

What a run or a store was made with must tell all of it: the next version may have other defaults.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dreamkit.errors import RecipePath
from dreamkit.recipe.construct import Builder
from dreamkit.recipe.open_terms import OpenTermsOf, is_auto
from dreamkit.recipe.signature import nested_options, options_of
from dreamkit.registry import EntriesOf, EntryOf, Registries, Term, TermsOf, mapping_of, name_key


def entry_with_defaults(registries: Registries, kind: str, entry: Any) -> Any:
    """Return an entry's data with every option of its, in the order of its constructor.

    Args:
        registries: that have it.
        kind: of which kind it is.
        entry: its name or a mapping that built it; any object inside stays as it is.
    """
    return _Writer(registries).entry(kind, entry)


def with_defaults(registries: Registries, cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Return the options that built an object of a class, and those that it has by default.

    Options whose default is no such value as they take are left out.
    """
    whole = _Writer(registries).options(cls, data)
    builder = Builder(registries)
    _, problems = builder.build(partial(builder.construct, cls), whole)
    for problem in problems:  # what was given has built one, so a default is to blame
        _drop(whole, problem.path)
    return whole


def _drop(data: Any, path: RecipePath) -> None:
    """Take the innermost option on a path out: of a list that is wrong in one place, all of it."""
    option = None
    for step in path:
        if isinstance(data, dict):
            option = data, step
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            break
    if option is not None:
        option[0].pop(option[1], None)


class _Unsayable(Exception):
    """A default that plain data cannot say."""


@dataclass(frozen=True)
class _Writer:
    registries: Registries

    def options(self, cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, option in options_of(cls).items():
            if name in given:
                value = given[name]
            elif option.required:
                continue
            else:
                try:
                    value = self.plain(option.default, option.marker)
                except _Unsayable:
                    continue
            found[name] = self.value(option.annotation, option.marker, value)
        return found

    def value(self, annotation: Any, marker: EntryOf | None, value: Any) -> Any:
        """Return what stands for an option, with the defaults inside it."""
        if isinstance(marker, EntriesOf | TermsOf):
            if isinstance(marker, TermsOf):
                if isinstance(marker, OpenTermsOf) and is_auto(value):
                    return value
                value = Builder(self.registries).listed(marker.kind, value)
            if not isinstance(value, list | tuple):
                return value
            weighted = isinstance(marker, TermsOf)
            return [self.entry(marker.kind, inner, weighted) for inner in value]
        if marker is not None:
            return self.entry(marker.kind, value)
        if isinstance(value, list | tuple):
            return [self.value(annotation, None, inner) for inner in value]
        nested = nested_options(annotation)
        if isinstance(value, dict) and len(nested) == 1:
            return self.options(nested[0], value)
        if type(value) is int and float in (leaves := _leaves(annotation)) and int not in leaves:
            return float(value)
        return value

    def entry(self, kind: str, value: Any, weighted: bool = False) -> Any:
        key = name_key(kind)
        if isinstance(value, str):
            value = mapping_of(kind, value)
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            return value
        head = {key: value[key]}
        if weighted:
            head["weight"] = float(value.get("weight", 1.0))
        return head | self.options(self.registries[kind].resolve(value[key]), value)

    def plain(self, value: Any, marker: EntryOf | None = None) -> Any:
        """Return a default as a recipe would have it.

        Raises:
            _Unsayable: it cannot be written.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, list | tuple):
            return [self.plain(inner, marker) for inner in value]
        if isinstance(value, dict):
            return {str(key): self.plain(inner) for key, inner in value.items()}
        if isinstance(value, Term) and marker is not None:
            named = {name_key(marker.kind): value.name, "weight": value.weight}
            return named | self._fields(value.entry)
        if not dataclasses.is_dataclass(value):
            raise _Unsayable
        return self._named(value, marker) | self._fields(value)

    def _named(self, entry: Any, marker: EntryOf | None) -> dict[str, Any]:
        if marker is None:
            return {}
        cls = type(entry)
        targets = {cls, f"{cls.__module__}:{cls.__qualname__}"}
        for name, registered in self.registries[marker.kind].entries.items():
            if registered.target in targets:
                return {name_key(marker.kind): name}
        raise _Unsayable

    def _fields(self, value: Any) -> dict[str, Any]:
        options = options_of(type(value))
        if not all(hasattr(value, name) for name in options):
            raise _Unsayable
        return {n: self.plain(getattr(value, n), option.marker) for n, option in options.items()}


def _leaves(annotation: Any) -> set[Any]:
    """Return the types at the ends of an annotation."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _leaves(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    arguments = typing.get_args(annotation)
    return set().union(*map(_leaves, arguments)) if arguments else {annotation}
