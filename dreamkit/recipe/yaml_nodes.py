"""YAML with the place of every node kept, read by YAML 1.2's rules for plain scalars.

PyYAML follows YAML 1.1: ``1e-5`` is a string there, ``no`` a boolean, and of two equal keys the
last wins in silence. Here numbers are YAML 1.2's, booleans are ``true`` and ``false`` alone,
equal keys are refused, and only the safe core tags are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from dreamkit.errors import RecipeError, RecipePath

MAX_DEPTH = 50
MAX_NUMBER_LENGTH = 4000
MAX_NODES = 100_000
"""More nodes than any recipe needs; an alias bomb passes it in a few lines."""


@dataclass(frozen=True)
class Position:
    """Where a node was written: a file's line and column (from 1), or an option such as --set."""

    source: str
    line: int | None = None
    column: int | None = None

    @property
    def order(self) -> tuple[str, int, int]:
        """Sorts places as they stand in their file."""
        return (self.source, self.line or 0, self.column or 0)

    def __str__(self) -> str:
        if self.line is None:
            return self.source
        return f"{self.source}:{self.line}:{self.column}"


NOWHERE = Position("")


@dataclass
class Node:
    """A value and where it stands. ``value`` is a scalar, or a dict or list of nodes."""

    value: Any
    where: Position
    keys: dict[str, Position] = field(default_factory=dict)

    def plain(self) -> Any:
        """Return the value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """Return what stands under a key or an index, or None."""
        if isinstance(self.value, dict):
            found: Node | None = self.value.get(step)
            return found
        if isinstance(self.value, list) and isinstance(step, int) and step < len(self.value):
            return cast(Node, self.value[step])
        return None

    def place(self, path: RecipePath, key: bool = False) -> Position:
        """Return where the value along ``path``, or its key, was written; or its nearest parent."""
        if not path:
            return self.where
        if key and len(path) == 1:
            return self.keys[str(path[0])]
        below = self.child(path[0])
        return self.where if below is None else below.place(path[1:], key)


def type_name(value: Any) -> str:
    """Return what a user calls a value's type."""
    names: dict[Any, str] = {dict: "a mapping", list: "a list", tuple: "a list", str: "a string"}
    names |= {bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return names.get(type(value), f"an instance of {type(value).__name__}")


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the YAML 1.2 core schema in place of the 1.1 one."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_CORE = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""Plain scalars of the YAML 1.2 core schema, in the order they are tried."""
_FIRST = {"null": ["~", "n", "N", ""], "bool": list("tTfF"), "int": list("-+0123456789")}
_FIRST["float"] = [*_FIRST["int"], "."]


class _CoreDumper(yaml.SafeDumper):
    """Quotes every string that the loader above, or PyYAML's own, would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _kind, _pattern in _CORE.items():
    _tag, _whole = f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern.pattern})\\Z")
    _CoreLoader.add_implicit_resolver(_tag, _whole, _FIRST[_kind])
    _CoreDumper.add_implicit_resolver(_tag, _whole, _FIRST[_kind])


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML that reads back the same."""
    text = yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)
    return str(text)


def parse_yaml(text: str, source: str, place: Position | None = None) -> Node:
    """Parse one YAML document.

    Args:
        text: the document.
        source: the name to report, a file or ``--set``.
        place: where all of it stands, if not at its line and column.

    Raises:
        RecipeError: a syntax error, an equal key, an unknown tag or too many nodes, with its place.
    """
    try:
        loader = _CoreLoader(text)
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"{source}: not a text file: {error.reason}") from error
    try:
        root = loader.get_single_node()
        builder = _Builder(source, place)
        return builder.build(root) if root else Node(None, place or Position(source, 1, 1))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Position(source, mark.line + 1, mark.column + 1) if mark else Position(source)
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{where} not valid YAML: {what}") from error
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply") from error
    finally:
        loader.dispose()


class _Builder:
    """Turns PyYAML's node graph into ``Node``s, refusing what a recipe has no use for."""

    def __init__(self, source: str, place: Position | None) -> None:
        self.source = source
        self.place = place
        self.count = 0

    def position(self, node: yaml.Node) -> Position:
        mark = node.start_mark
        return self.place or Position(self.source, mark.line + 1, mark.column + 1)

    def build(self, node: yaml.Node, depth: int = 0) -> Node:
        self.count += 1
        where = self.position(node)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{where} nested more than {MAX_DEPTH} deep")
        if self.count > MAX_NODES:
            raise RecipeError(f"{where} more than {MAX_NODES} nodes after expanding aliases")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, where, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return Node([self.build(child, depth + 1) for child in node.value], where)
        if isinstance(node, yaml.ScalarNode):
            return Node(self.scalar(node, where), where)
        raise RecipeError(f"{where} the tag {_short(node.tag)} is not allowed in a recipe")

    def mapping(self, node: yaml.MappingNode, where: Position, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, Position] = {}
        for key_node, value_node in node.value:
            at = self.position(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{at} a key must be a plain word")
            key = str(key_node.value)
            if key in values:
                raise RecipeError(f"{at} the key '{key}' stands twice; it was first at {keys[key]}")
            keys[key] = at
            values[key] = self.build(value_node, depth + 1)
        return Node(values, where, keys)

    def scalar(self, node: yaml.ScalarNode, where: Position) -> Any:
        kind = node.tag.rpartition(":")[2]
        text = node.value
        allowed = {"str", "null", "bool", "int", "float"}
        if not node.tag.startswith("tag:yaml.org,2002:") or kind not in allowed:
            raise RecipeError(f"{where} the tag {_short(node.tag)} is not allowed in a recipe")
        if kind == "str":
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RecipeError(f"{where} half of a surrogate pair is no text")
            return text
        # The tag may have been written out (!!bool maybe), so the text is held against it.
        if len(text) > MAX_NUMBER_LENGTH or not _CORE[kind].fullmatch(text):
            raise RecipeError(f"{where} '{text[:40]}' is not {kind}")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
