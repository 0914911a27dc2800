"""From a node of a recipe to an object: a class's typed constructor is the schema of its options.

Every problem is collected with its place; nothing is loaded or computed here beyond calling the
constructors, which are cheap by contract.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, create_model

from dreamkit.errors import MissingPath, OptionError, RecipeError, RecipePath, did_you_mean
from dreamkit.recipe.signature import Option, nested_options, options_of
from dreamkit.recipe.yaml_nodes import Node, Position
from dreamkit.registry import (
    EntryOf,
    RecordsOf,
    Registries,
    Term,
    TermsOf,
    UnknownEntry,
    name_key,
)


@dataclass
class Problems:
    """Every problem found in a recipe, in the order of the file."""

    found: dict[str, Position] = field(default_factory=dict)
    missing: dict[str, Position] = field(default_factory=dict)
    noted: int = 0

    def add(self, place: Position, path: RecipePath, message: str, missing: bool = False) -> None:
        """Note one problem; the same one from several presets counts once.

        Args:
            place: where it was written.
            path: what it concerns.
            message: what is wrong and how to mend it.
            missing: the recipe is sound, but a file it names is not on this machine.
        """
        self.noted += 1
        line = f"{located(place, path)}: {message}"
        (self.missing if missing else self.found)[line] = place

    def raise_if_any(self) -> None:
        """Raise all problems as one error.

        Raises:
            RecipeError: there is at least one.
        """
        every = {**self.found, **self.missing}
        if every:
            raise RecipeError("\n".join(sorted(every, key=lambda line: every[line].order)))


def format_path(path: RecipePath) -> str:
    """Write a path as ``synthesis.regularizers[1].weight``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "recipe"


def located(place: Position, path: RecipePath) -> str:
    """Write where a value was written and what it is: ``r.yaml:3:11 synthesis.images``.

    Of what was written by ``--set synthesis.images=...`` the place is the value's path already.
    """
    name = format_path(path)
    override = f"--set {name}"
    return override if override.startswith(str(place)) else f"{place} {name}"


@dataclass
class Constructor:
    """Builds the objects that a recipe describes, against one set of registries."""

    registries: Registries
    problems: Problems

    def construct(
        self, cls: type[Any], node: Node, path: RecipePath, skip: frozenset[str] = frozenset()
    ) -> Any:
        """Return ``cls`` built from the node's options, or None after noting the problems.

        Args:
            cls: the class; its constructor's parameters are the options allowed.
            node: a mapping.
            path: where the node stands in the recipe.
            skip: keys of the mapping that are not options of the class.
        """
        if not isinstance(node.value, dict):
            self.problems.add(node.where, path, f"should be a mapping, not {node.type_name}")
            return None
        before = self.problems.noted
        options = options_of(cls)
        self._refuse_unknown(node, path, options, skip)
        values: dict[str, Any] = {}
        for name, option in options.items():
            if name not in node.value:
                if option.required:
                    self.problems.add(node.where, path, f"the option '{name}' is missing")
                continue
            if option.marker is not None:
                values[name] = self._entries(option, node.value[name], (*path, name))
        values |= self._scalars(cls, node, path, options)
        if self.problems.noted > before:
            return None
        try:
            return cls(**values)
        except OptionError as error:
            where = _descend(node, (error.option,)).where
            lacking = isinstance(error, MissingPath)
            self.problems.add(where, (*path, error.option), str(error), lacking)
        except ValueError as error:
            self.problems.add(node.where, path, str(error))
        return None

    def _refuse_unknown(
        self, node: Node, path: RecipePath, options: dict[str, Option], skip: frozenset[str]
    ) -> None:
        allowed = [*options, *skip]
        for key in node.value:
            if key not in allowed:
                hint = did_you_mean(key, allowed)
                hint = hint or f" (options: {', '.join(sorted(allowed)) or 'none'})"
                self.problems.add(node.keys[key], (*path, key), f"unknown option{hint}")

    def _scalars(
        self, cls: type[Any], node: Node, path: RecipePath, options: dict[str, Option]
    ) -> dict[str, Any]:
        """Validate the options that are not entries, strictly, by the constructor's types."""
        plain = {name: o for name, o in options.items() if o.marker is None and name in node.value}
        # The configuration holds for dataclasses inside too: unknown keys are refused everywhere.
        # Fields go by number, since a model has attributes of its own that names could hide.
        fields: dict[str, Any] = {
            f"option_{number}": (option.annotation, Field(..., alias=option.name))
            for number, option in enumerate(plain.values())
        }
        model = create_model(
            cls.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
        )
        data = {name: node.value[name].plain() for name in plain}
        try:
            # JSON mode: strict about types, yet a YAML list may become a tuple, a string a Path.
            made = model.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            for where, place, message in _messages(error, node, options):
                self.problems.add(where, (*path, *place), message)
            return {}
        return {name: getattr(made, f"option_{number}") for number, name in enumerate(plain)}

    def _entries(self, option: Option, node: Node, path: RecipePath) -> Any:
        marker = option.marker
        if node.value is None and option.nullable:
            return None
        if isinstance(marker, EntryOf):
            return self.entry(marker.kind, node, path)
        assert marker is not None
        if not isinstance(node.value, list):
            self.problems.add(node.where, path, f"should be a list, not {node.type_name}")
            return None
        if isinstance(marker, RecordsOf):
            return tuple(
                self.construct(marker.cls, n, (*path, i)) for i, n in enumerate(node.value)
            )
        make = self.term if isinstance(marker, TermsOf) else self.entry
        return tuple(make(marker.kind, n, (*path, i)) for i, n in enumerate(node.value))

    def entry(
        self, kind: str, node: Node, path: RecipePath, skip: frozenset[str] = frozenset()
    ) -> Any:
        """Return the registry entry that a mapping names, built with its options."""
        key = name_key(kind)
        if not isinstance(node.value, dict):
            self.problems.add(node.where, path, f"should be a mapping, not {node.type_name}")
            return None
        named = node.value.get(key)
        if named is None or not isinstance(named.value, str):
            place = named.where if named else node.where
            choices = ", ".join(self.registries[kind])
            self.problems.add(place, path, f"'{key}' should name one of the {kind}: {choices}")
            return None
        try:
            cls = self.registries[kind].resolve(named.value)
        except UnknownEntry as error:
            self.problems.add(named.where, (*path, key), str(error) + self._failed_plugins())
            return None
        try:
            taken = sorted({*skip, key} & options_of(cls).keys())
        except TypeError as error:
            provider = self.registries[kind].provider(named.value)
            self.problems.add(
                named.where, path, f"'{named.value}' of {provider} is unusable: {error}"
            )
            return None
        if taken:
            self.problems.add(
                named.where,
                path,
                f"'{named.value}' has an option '{taken[0]}', which recipes reserve",
            )
            return None
        return self.construct(cls, node, path, skip | {key})

    def term(self, kind: str, node: Node, path: RecipePath) -> Term[Any] | None:
        """Return a weighted entry; the weight defaults to 1 and cannot be negative."""
        entry = self.entry(kind, node, path, frozenset({"weight"}))
        given = node.child("weight")
        weight = 1.0 if given is None else self._weight(given, (*path, "weight"))
        if entry is None or weight is None:
            return None
        return Term(node.value[name_key(kind)].value, weight, entry)

    def _weight(self, node: Node, path: RecipePath) -> float | None:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            shown = "" if isinstance(node.value, dict | list) else f" ({node.value!r})"
            message = f"should be a number, not {node.type_name}{shown}"
        elif not 0 <= node.value <= sys.float_info.max:
            message = f"should be a finite number >= 0 (got {str(node.value)[:40]})"
        else:
            return float(node.value)
        self.problems.add(node.where, path, message)
        return None

    def _failed_plugins(self) -> str:
        if not self.registries.failures:
            return ""
        failed = "; ".join(f"{f.plugin} ({f.reason})" for f in self.registries.failures)
        return f"; plugins that failed to load: {failed}"


def _descend(node: Node, path: RecipePath) -> Node:
    """Return the deepest node that exists along ``path``."""
    for step in path:
        below = node.child(step)
        if below is None:
            break
        node = below
    return node


def _messages(
    error: ValidationError, node: Node, options: dict[str, Option]
) -> Iterator[tuple[Position, RecipePath, str]]:
    """Yield each pydantic problem as its place, its path inside the node and a plain message.

    A union reports one problem for each of its branches, under one place; they become one line.
    """
    merged: dict[RecipePath, list[str]] = {}
    for problem in error.errors(include_url=False):
        place = _real_path(node, problem["loc"])
        message = problem["msg"].replace("Input should be", "should be")
        message = message.replace("a valid array", "a list").replace("Tuple", "a list")
        message = message.removeprefix("Value error, ")
        if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            classes = nested_options(options[str(problem["loc"][0])].annotation)
            known = [name for cls in classes for name in options_of(cls)]
            hint = did_you_mean(str(place[-1]), known) or f" (options: {', '.join(known)})"
            message = f"unknown option{hint}"
        elif problem["type"] == "missing":
            message = f"the option '{problem['loc'][-1]}' is missing"
        merged.setdefault(place, [])
        if message not in merged[place]:
            merged[place].append(message)
    for place, messages in merged.items():
        inside = [
            m for other in merged if other[: len(place)] == place != other for m in merged[other]
        ]
        if inside and not _tell_more(inside, messages):
            continue
        parent, at = _descend(node, place[:-1]), _descend(node, place)
        unknown = messages[0].startswith("unknown option")
        where = parent.keys[str(place[-1])] if unknown else at.where
        shown = not unknown and not isinstance(at.value, dict | list)
        yield where, place, ", or ".join(messages) + (f" (got {at.value!r})" if shown else "")


def _tell_more(inside: list[str], messages: list[str]) -> bool:
    """Return whether a value's problems say more than those inside it: an option is missing.

    It is not missing where the one inside is its misspelling.
    """
    missing = [m.split("'")[1] for m in messages if m.endswith("is missing")]
    return any(not any(f"mean '{name}'" in m for m in inside) for name in missing)


def _real_path(node: Node, location: tuple[str | int, ...]) -> RecipePath:
    """Keep the steps of pydantic's location that exist in the recipe (it adds union branches)."""
    path: list[str | int] = []
    for step in location:
        below = node.child(step)
        if below is not None:
            node = below
            path.append(step)
    return tuple(path)
