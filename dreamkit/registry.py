"""Registries: named entries of each kind, who provides them, and how a recipe refers to them.

An entry is a class whose typed constructor parameters are its options in YAML. Built-ins
register by reference (``"package.module:Class"``), so that filling registries imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import pluggy

from dreamkit.docstrings import docstring_of
from dreamkit.errors import DuplicateEntry, PluginError, did_you_mean
from dreamkit.events import EventEmitter, Listener

hookimpl = pluggy.HookimplMarker("dreamkit")
"""Marks a function as an implementation of one of the hooks in ``dreamkit.hookspecs``."""

T = TypeVar("T")

KINDS: tuple[str, ...] = (
    "regularizers",
    "synthesizers",
    "parameterisations",
    "teachers",
    "sources",
    "criteria",
    "channel_rules",
    "losses",
    "distillation_losses",
    "selections",
    "latency_backends",
    "applications",
    "exporters",
    "quantizers",
    "trackers",
)
RECORDED = frozenset({"loss", "cross_entropy", "contrast"})
"""Under these names a dreaming's records have what no regularizer gives."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_TARGET = re.compile(r"[\w.]+:\w+")


def name_key(kind: str) -> str:
    """Return the YAML key that names an entry: ``source`` for things read from somewhere."""
    return "source" if kind in {"teachers", "sources"} else "name"


def mapping_of(kind: str, text: str) -> dict[str, str]:
    """Return the mapping that a bare name stands for; of a teacher, ``SOURCE:MODEL`` does too."""
    source, colon, model = text.partition(":")
    if kind == "teachers" and colon:
        return {name_key(kind): source, "model": model}
    return {name_key(kind): text}


WEIGHT_SCHEMA = {"type": "number", "minimum": 0}


@dataclass(frozen=True)
class EntryOf:
    """Annotation marker: the option is one registry entry of this kind, a mapping or its name."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, _handler: Any) -> Any:
        """Have the builder, which validators are given as their context, make the entry.

        The declared type says whether null is a value.
        """
        from pydantic_core import core_schema

        schema = self._schema(core_schema)
        optional = type(None) in typing.get_args(source)
        return core_schema.nullable_schema(schema) if optional else schema

    def __get_pydantic_json_schema__(self, schema: Any, _handler: Any) -> Any:
        """Refer to the definition of the kind, which whoever asks for the schema adds."""
        made = self._json_schema()
        return {"anyOf": [made, {"type": "null"}]} if schema["type"] == "nullable" else made

    def _schema(self, core: Any) -> Any:
        return core.with_info_plain_validator_function(
            lambda value, info: info.context.entry(self.kind, value)
        )

    def _json_schema(self) -> dict[str, Any]:
        return {"$entry": f"#/$defs/{self.kind}"}


@dataclass(frozen=True)
class EntriesOf(EntryOf):
    """Annotation marker: the option is a list of registry entries of this kind."""

    def _schema(self, core: Any) -> Any:
        return core.tuple_schema([super()._schema(core)], variadic_item_index=0)

    def _json_schema(self) -> dict[str, Any]:
        return {"type": "array", "items": super()._json_schema()}


@dataclass(frozen=True)
class TermsOf(EntryOf):
    """Annotation marker: the option is a list of weighted registry entries of this kind.

    A mapping of names to weights stands for such a list, and one entry for a list of one.
    """

    def _schema(self, core: Any) -> Any:
        term = core.with_info_plain_validator_function(
            lambda value, info: info.context.term(self.kind, value)
        )
        return core.with_info_before_validator_function(
            lambda value, info: info.context.listed(self.kind, value),
            core.tuple_schema([term], variadic_item_index=0),
        )

    def _json_schema(self) -> dict[str, Any]:
        terms = {"type": "array", "items": {"$entry": f"#/$defs/weighted_{self.kind}"}}
        weights = {"type": "object", "additionalProperties": WEIGHT_SCHEMA}
        return {"anyOf": [terms, terms["items"], weights]}


@dataclass(frozen=True)
class Term(Generic[T]):
    """A weighted entry of a sum. The weight (>= 0) belongs to the recipe, never to the class."""

    name: str
    weight: float
    entry: T


class Register(Protocol):
    """What a ``register_<kind>`` hook receives."""

    def __call__(self, name: str, target: type[Any] | str) -> None:
        """Add ``target``, a class or ``"package.module:Class"``, under ``name``."""


@dataclass
class Registered:
    """One registered entry before it is resolved."""

    target: type[Any] | str
    provider: str


class UnknownEntry(LookupError):
    """A name that no provider registered; the message lists the choices."""


@dataclass
class Registry:
    """The entries of one kind."""

    kind: str
    entries: dict[str, Registered] = field(default_factory=dict)

    def register(self, name: str, target: type[Any] | str, provider: str) -> None:
        """Add an entry.

        Raises:
            DuplicateEntry: the name is taken; the message names both providers.
            ValueError: the name has characters other than ``a-z 0-9 _ . -``, or is a regularizer's
                under which records have something else.
            TypeError: the target is neither a class nor ``"package.module:Class"``.
        """
        if not (inspect.isclass(target) or (isinstance(target, str) and _TARGET.fullmatch(target))):
            raise TypeError(f"{self.kind} '{name}': register a class or 'package.module:Class'")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{self.kind} name {name!r}: use lower-case letters, digits, '_-.'")
        if self.kind == "regularizers" and name in RECORDED:
            raise ValueError(f"regularizers name '{name}': records have the loss's own under it")
        if name in self.entries:
            first = self.entries[name].provider
            raise DuplicateEntry(
                f"{self.kind} '{name}' is registered twice: by {first} and by {provider}"
            )
        self.entries[name] = Registered(target, provider)

    def withdraw(self, provider: str) -> None:
        """Remove every entry of one provider."""
        self.entries = {n: e for n, e in self.entries.items() if e.provider != provider}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.entries))

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def _registered(self, name: str) -> Registered:
        if name not in self.entries:
            raise UnknownEntry(
                f"no {name_key(self.kind)} '{name}' among the {self.kind}"
                f"{did_you_mean(name, self)} (choices: {', '.join(self) or 'none'})"
            )
        return self.entries[name]

    def provider(self, name: str) -> str:
        """Return who registered ``name``."""
        return self._registered(name).provider

    def resolve(self, name: str) -> type[Any]:
        """Return the class registered under ``name``, importing it if need be.

        Raises:
            UnknownEntry: nobody registered the name.
            PluginError: the class its provider registered by reference cannot be imported, or it
                lacks what entries of the kind have.
        """
        found = self._registered(name)
        cls = self._imported(name, found)
        try:
            # It comes with torch, which listing does without.
            from dreamkit.types.entries import check_entry

            check_entry(self.kind, cls)
        except TypeError as error:
            raise PluginError(
                f"{self.kind} '{name}' of {found.provider} is unusable: {error}"
            ) from error
        return cls

    def _imported(self, name: str, found: Registered) -> type[Any]:
        if not isinstance(found.target, str):
            return found.target
        module, _, attribute = found.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # importing runs the provider's code
            raise PluginError(
                f"{self.kind} '{name}' of {found.provider} cannot be loaded from {found.target}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not inspect.isclass(cls):
            raise PluginError(f"{self.kind} '{name}' of {found.provider} is no class")
        imported: type[Any] = cls
        return imported

    def summary(self, name: str) -> str:
        """Return the first line of the entry's docstring, without importing it where that goes.

        A reference that leads nowhere has none; the error comes when the entry is used.
        """
        found = self._registered(name)
        if isinstance(found.target, str) and (read := docstring_of(found.target)):
            return read.partition("\n")[0]
        try:
            cls = self._imported(name, found)
            return (inspect.getdoc(cls) or "").partition("\n")[0]
        except PluginError:
            return ""


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be loaded; the rest go on without it."""

    plugin: str
    reason: str


@dataclass
class Registries:
    """One registry for each kind, the providers that filled them, and those that failed."""

    by_kind: dict[str, Registry] = field(
        default_factory=lambda: {kind: Registry(kind) for kind in KINDS}
    )
    providers: list[str] = field(default_factory=list)
    failures: list[PluginFailure] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    """Providers that the recipe itself names: all of theirs must load."""
    listeners: list[tuple[str, Listener]] = field(default_factory=list)
    """Who is told of a run's events, by its provider."""

    def events(self, note: Callable[[str], None]) -> EventEmitter:
        """Return what tells the plugins of one run's events.

        Args:
            note: told of a plugin that fails, once; it is left out for the rest of the run.
        """
        return EventEmitter([(f"the plugin {who}", heard) for who, heard in self.listeners], note)

    def __getitem__(self, kind: str) -> Registry:
        return self.by_kind[kind]

    def withdraw(self, provider: str) -> None:
        """Remove a provider and every entry that it registered."""
        self.providers = [known for known in self.providers if known != provider]
        for registry in self.by_kind.values():
            registry.withdraw(provider)
