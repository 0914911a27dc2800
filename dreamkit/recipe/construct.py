"""From plain data to objects: pydantic validates, a class's typed constructor is the schema.

Data are what YAML holds or what Python hands over; there, any value may be a finished object
already, which is taken as it is. Nothing is loaded or computed beyond calling the constructors,
which are cheap by contract.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaValidator, core_schema

from dreamkit.errors import OptionError, PluginError
from dreamkit.recipe.problems import Problem, problems_of
from dreamkit.recipe.signature import options_of
from dreamkit.recipe.yaml_nodes import type_name
from dreamkit.registry import Registries, Term, UnknownEntry, mapping_of, name_key

_PLAIN = (dict, list, tuple, str, bytes, int, float, type, type(None))
"""What is data, or a mistake; anything else that stands for an entry is one."""


@dataclass
class Builder:
    """Builds the objects that data describe, against one set of registries."""

    registries: Registries
    known: dict[int, set[str]] = field(default_factory=dict)
    """The options that each mapping met so far (by its id) may have."""
    _validators: dict[tuple[Any, ...], SchemaValidator] = field(default_factory=dict)

    def build(
        self, make: Callable[[Any], Any], data: Any, keywords: Collection[str] = ()
    ) -> tuple[Any, list[Problem]]:
        """Return what one of this builder's methods makes of the data, or None and every problem.

        Args:
            make: ``construct``, ``entry`` or ``term``, its first argument bound.
            data: what to build from.
            keywords: of the function whose other keywords the data are; for messages.
        """
        self.known.clear()
        whole = core_schema.no_info_plain_validator_function(make)
        try:
            return SchemaValidator(whole).validate_python(data), []
        except ValidationError as error:
            if keywords:  # the entry's name was no keyword
                self.known[id(data)] = {*self.known.get(id(data), ()), *keywords} - {"name"}
            return None, problems_of(error, data, self.known)

    def construct(self, cls: type[Any], data: Any) -> Any:
        """Return ``cls`` built from a mapping of its options.

        Raises:
            ValidationError: of every problem.
        """
        return self._validator(cls, ()).validate_python(data, context=self)[1]

    def entry(self, kind: str, value: Any) -> Any:
        """Return the registry entry that a mapping describes or a name stands for.

        Args:
            kind: of which kind it is.
            value: the mapping, the name, or the entry itself.

        Raises:
            ValueError: a problem, or as a ``ValidationError`` several.
        """
        return self._named(kind, value).entry

    def term(self, kind: str, value: Any) -> Term[Any]:
        """Return a weighted entry; the weight defaults to 1 and cannot be negative.

        Args:
            kind: of which kind the entry is.
            value: a mapping, a name, an entry or a term.

        Raises:
            ValueError: a problem, or as a ``ValidationError`` several.
        """
        if isinstance(value, Term):
            entry = self.entry(kind, value.entry)
            return Term(value.name, _check_weight(value.weight), entry)
        return self._named(kind, value, "weight")

    def listed(self, kind: str, value: Any) -> Any:
        """Return a mapping of names to weights as the list of terms that it stands for.

        A weight may also be an object, or a pair of a weight and an object. One entry stands for a
        list of one.
        """
        alone = isinstance(value, str | Term) or not isinstance(value, _PLAIN)
        if alone or (isinstance(value, dict) and name_key(kind) in value):
            return [value]
        if not isinstance(value, dict):
            return value
        terms: list[Any] = []
        for name, given in value.items():
            is_pair = isinstance(given, tuple) and len(given) == 2
            weight, entry = given if is_pair else (1.0, given)
            if isinstance(entry, _PLAIN):
                terms.append({name_key(kind): name, "weight": given})
            else:
                terms.append(Term(name, weight, entry))
        return terms

    def _named(self, kind: str, value: Any, *extra: str) -> Term[Any]:
        key = name_key(kind)
        if isinstance(value, str):
            value = mapping_of(kind, value)
        if not isinstance(value, _PLAIN):
            _check_entry(kind, value)
            return Term(self._name_of(kind, value), 1.0, value)
        if isinstance(value, type):
            raise ValueError(f"should be an object, not its class: write {value.__name__}(...)")
        if not isinstance(value, dict):
            raise ValueError(f"should be a mapping, not {type_name(value)}")
        name = value.get(key)
        if not isinstance(name, str):
            choices = ", ".join(self.registries[kind])
            message = f"should name one of the {kind}: {choices}"
            raise OptionError(key, message) if key in value else ValueError(f"'{key}' {message}")
        try:
            cls = self.registries[kind].resolve(name)
        except UnknownEntry as error:
            raise OptionError(key, f"{error}{self._failed_plugins()}") from error
        except PluginError as error:
            raise OptionError(key, str(error)) from error
        try:
            taken = sorted({key, *extra} & options_of(cls).keys())
            if taken:
                raise ValueError(f"'{name}' has an option '{taken[0]}', which recipes reserve")
            validator = self._validator(cls, (key, *extra))
        except (TypeError, NameError, PydanticUserError) as error:
            provider = self.registries[kind].provider(name)
            reason = str(error).partition("\n")[0]
            raise ValueError(f"'{name}' of {provider} is unusable: {reason}") from error
        weight, entry = validator.validate_python(value, context=self)
        return Term(name, weight, entry)

    def _name_of(self, kind: str, entry: Any) -> str:
        """Return the name an object's class is registered under, or else the class's own."""
        cls = type(entry)
        targets = {cls, f"{cls.__module__}:{cls.__qualname__}"}
        entries = self.registries[kind].entries
        named = (name for name, registered in entries.items() if registered.target in targets)
        return next(named, cls.__name__)

    def _failed_plugins(self) -> str:
        if not self.registries.failures:
            return ""
        failed = "; ".join(f"{f.plugin} ({f.reason})" for f in self.registries.failures)
        return f"; plugins that failed to load: {failed}"

    def _validator(self, cls: type[Any], reserved: tuple[str, ...]) -> SchemaValidator:
        """Return what makes a mapping into the weight and the object; ``reserved`` are its keys."""
        if (cls, *reserved) not in self._validators:
            schema = options_adapter(cls, reserved).core_schema
            self._validators[cls, *reserved] = SchemaValidator(_strict(schema))
        return self._validators[cls, *reserved]


def options_adapter(cls: type[Any], reserved: tuple[str, ...] = ()) -> TypeAdapter[Any]:
    """Return pydantic's adapter of the mapping of a class's options.

    Args:
        cls: the class; its constructor's parameters are the options.
        reserved: keys of the mapping that are no options: what names an entry, and ``weight``.
    """
    return TypeAdapter(Annotated[Any, _OptionsOf(cls, reserved)])


@dataclass(frozen=True)
class _OptionsOf:
    """Tells pydantic that a type is the mapping of a constructor's options."""

    cls: type[Any]
    reserved: tuple[str, ...]

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> Any:
        fields = {
            name: core_schema.typed_dict_field(
                handler.generate_schema(option.annotation), required=option.required
            )
            for name, option in options_of(self.cls).items()
        }
        for name in self.reserved:
            checked = core_schema.no_info_plain_validator_function(_check_weight)
            schema = checked if name == "weight" else core_schema.any_schema()
            fields[name] = core_schema.typed_dict_field(schema, required=False)
        mapping = core_schema.typed_dict_schema(fields)
        return core_schema.no_info_after_validator_function(self._call, mapping)

    def _call(self, values: dict[str, Any]) -> tuple[float, Any]:
        reserved = {name: values.pop(name) for name in self.reserved if name in values}
        return reserved.get("weight", 1.0), self.cls(**values)


def _check_entry(kind: str, entry: Any) -> None:
    from dreamkit.types.entries import check_entry  # torch, which listing recipes does without

    try:
        check_entry(kind, type(entry))
    except TypeError as error:
        raise ValueError(f"{type_name(entry)} will not do here: {error}") from error


def _check_weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"should be a number, not {type_name(value)}")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError("should be a finite number >= 0")
    return float(value)


def _strict(schema: Any) -> Any:
    """Return a core schema with strict and finite scalars, and mappings that know their options.

    Not all of it is strict: a YAML list may become a tuple, a string a Path.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    made = {k: v if k in {"default", "metadata"} else _strict(v) for k, v in schema.items()}
    kind = schema.get("type")
    if kind in {"int", "float", "str", "bool"}:
        made["strict"] = True
    if kind == "float":
        made["allow_inf_nan"] = False
    if kind in {"typed-dict", "dataclass-args"}:
        made["extra_behavior"] = "forbid"
        fields = schema["fields"]
        names = set(fields) if isinstance(fields, dict) else {f["name"] for f in fields}
        return core_schema.with_info_before_validator_function(partial(_note, names), made)
    return made


def _note(names: set[str], value: Any, info: core_schema.ValidationInfo[Builder]) -> Any:
    info.context.known.setdefault(id(value), set()).update(names)
    return value
