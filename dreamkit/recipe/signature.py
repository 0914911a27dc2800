"""The options of an entry, read off its constructor."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from dreamkit.registry import EntriesOf, EntryOf, TermsOf

_ABSENT = inspect.Parameter.empty


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
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    # Annotations are resolved where they were written; inherited fields, in another module.
    written = cls if fields.issuperset(name for name, _ in parameters) else cls.__init__
    hints = typing.get_type_hints(written, include_extras=True)
    factories = {
        f.name: f.default_factory
        for f in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if f.default_factory is not dataclasses.MISSING
    }
    options = {}
    for name, parameter in parameters:
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            raise TypeError(f"{cls.__qualname__}: options cannot come from *{name}")
        if name not in hints:
            raise TypeError(f"{cls.__qualname__}: the parameter '{name}' has no type annotation")
        default = factories[name]() if name in factories else parameter.default
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


def describe(annotation: Any) -> str:
    """Return an annotation the way a person would write it."""
    if typing.get_origin(annotation) is Annotated:
        marker = _marker(annotation)
        if isinstance(marker, EntriesOf | TermsOf):
            weighted = "weighted " if isinstance(marker, TermsOf) else ""
            return f"list of {weighted}{marker.kind}"
        if marker is not None:
            return f"one of the {marker.kind}"
        limits = [
            re.sub(r"annotated_types\.|\w+\((\w+=.*)\)", r"\1", str(limit))
            for extra in annotation.__metadata__
            for limit in (getattr(extra, "metadata", None) or [extra])
        ]
        return f"{describe(annotation.__origin__)} ({', '.join(limits)})"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(json.dumps(choice) for choice in arguments)
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(describe(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else describe(a) for a in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))
