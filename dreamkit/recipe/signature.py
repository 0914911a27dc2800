"""The options of an entry, read off its constructor."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dreamkit.recipe.open_terms import OpenTermsOf, is_auto
from dreamkit.recipe.shares import MixOf
from dreamkit.registry import EntriesOf, EntryOf, Registered, Registries, TermsOf

_ABSENT = inspect.Parameter.empty
_WORDS = {int: "integer", float: "number", str: "text", bool: "true | false", Path: "path"}
_WORDS[type(None)] = "null"
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_LIMITS |= {"min_length": "length >=", "max_length": "length <="}


@dataclass(frozen=True)
class Option:
    """One constructor parameter of an entry, which is one option in YAML."""

    name: str
    annotation: Any
    default: Any
    marker: EntryOf | None

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is _ABSENT


def options_of(cls: type[Any]) -> dict[str, Option]:
    """Read a class's options off its constructor.

    Raises:
        TypeError: a parameter has no type annotation, or takes ``*args`` or ``**kwargs``.
    """
    if cls.__init__ is object.__init__:
        return {}
    parameters = list(inspect.signature(cls.__init__).parameters.items())[1:]
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    # Annotations are resolved where they were written; inherited fields, in another module.
    written = cls if all(name in fields for name, _ in parameters) else cls.__init__
    hints = typing.get_type_hints(written, include_extras=True)
    options = {}
    for name, parameter in parameters:
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            raise TypeError(f"{cls.__qualname__}: options cannot come from *{name}")
        if name not in hints:
            raise TypeError(f"{cls.__qualname__}: the parameter '{name}' has no type annotation")
        factory = fields[name].default_factory if name in fields else dataclasses.MISSING
        default = parameter.default if factory is dataclasses.MISSING else factory()
        options[name] = Option(name, hints[name], default, _marker(hints[name]))
    return options


def _marker(annotation: Any) -> EntryOf | None:
    if typing.get_origin(annotation) is Annotated:
        for extra in annotation.__metadata__:
            if isinstance(extra, EntryOf):
                return extra
    return None


def documentation(cls: type[Any]) -> str:
    """Return a class's docstring, and those of the classes that it has options from."""
    texts = [
        inspect.cleandoc(base.__doc__)
        for base in cls.__mro__
        if base.__doc__ and dataclasses.is_dataclass(base) and "Args:" in base.__doc__
    ]
    return "\n\n".join(texts) or (inspect.getdoc(cls) or "")


def nested_options(annotation: Any) -> list[type[Any]]:
    """Return the dataclasses inside an annotation: mappings with options of their own."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    found = [nested_options(argument) for argument in typing.get_args(annotation)]
    return list(dict.fromkeys(cls for classes in found for cls in classes))


@dataclass(frozen=True)
class OptionRow:
    """What a table says about one option.

    Args:
        name: as written in YAML and in Python.
        accepts: what it may be, in words.
        default: as YAML, or ``required``.
        range: what limits it, such as ``> 0``; empty for nothing.
        help: the first sentence of what its class's docstring says about it.
        nested: the class whose options a mapping given for it has, if any.
    """

    name: str
    accepts: str
    default: str
    range: str
    help: str
    nested: type[Any] | None


def option_rows(cls: type[Any], registries: Registries | None = None) -> list[OptionRow]:
    """Return a row for every option of a class, in the order of its constructor.

    Args:
        cls: the class.
        registries: tell what an entry that is a default is called.

    Raises:
        TypeError: a parameter has no type annotation, or takes ``*args`` or ``**kwargs``.
    """
    text = documentation(cls)
    return [
        OptionRow(
            option.name,
            describe(option.annotation),
            "required" if option.required else _default(option, registries),
            ", ".join(dict.fromkeys(_limits(option.annotation))),
            _first_sentence(described(text, option.name)),
            next(iter(nested_options(option.annotation)), None),
        )
        for option in options_of(cls).values()
    ]


def described(text: str, name: str) -> str:
    """Return what the ``Args`` of a docstring say of an option, on one line; empty if nothing."""
    found = re.search(rf"^ {{4}}{re.escape(name)}: (.*(?:\n {{8}}.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[^.]{2}\.) (?=[A-Z`])", text)[0].rstrip(".")


def _name_of(cls: type[Any], entries: Mapping[str, Registered]) -> str | None:
    """Return the name that a class is registered under; none is imported, as it may not load."""
    reference = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, e in entries.items() if e.target in (cls, reference)), None)


def _default(option: Option, registries: Registries | None) -> str:
    value = option.default
    if dataclasses.is_dataclass(value) and not _given(value):
        if option.marker is None:
            return "its own defaults"
        cls = type(value)
        entries = {} if registries is None else registries[option.marker.kind].entries
        return _name_of(cls, entries) or cls.__name__
    if isinstance(option.marker, TermsOf) and not is_auto(value):
        value = {term.name: term.weight for term in value}
    return json.dumps(value, default=_given, ensure_ascii=False)


def _given(value: Any) -> Any:
    """Return what of an object differs from its class's defaults, as YAML would write it."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    own = options_of(type(value))
    given = {name: getattr(value, name) for name in own}
    return {name: v for name, v in given.items() if own[name].required or v != own[name].default}


def _limits(annotation: Any) -> Iterator[str]:
    """Yield the limits that an annotation sets, those of what is inside it too."""
    if typing.get_origin(annotation) is Annotated:
        for extra in annotation.__metadata__:
            for limit in getattr(extra, "metadata", None) or [extra]:
                for name, words in _LIMITS.items():
                    if hasattr(limit, name):
                        yield f"{words} {getattr(limit, name)}".replace(str(2**63), "2^63")
    for argument in typing.get_args(annotation):
        yield from _limits(argument)


def describe(annotation: Any) -> str:
    """Return what values an annotation stands for, as a person would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        marker = _marker(annotation)
        if isinstance(marker, TermsOf):
            return f"list of weighted {marker.kind}" + (
                ' | "auto"' if isinstance(marker, OpenTermsOf) else ""
            )
        if isinstance(marker, EntriesOf):
            return f"list of {marker.kind}"
        if isinstance(marker, MixOf):
            return f"one of the {marker.kind} | list of them, each with a share"
        return f"one of the {marker.kind}" if marker else describe(arguments[0])
    if origin is typing.Literal:
        return " | ".join(json.dumps(choice) for choice in arguments)
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(map(describe, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {describe(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(describe, arguments))}]"
    if origin is dict:
        return "mapping"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
