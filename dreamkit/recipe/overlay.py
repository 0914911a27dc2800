"""Laying presets and ``--set`` overrides over a recipe, each value keeping its own place."""

from __future__ import annotations

import re

from dreamkit.errors import RecipeError, RecipePath
from dreamkit.recipe.problems import format_path
from dreamkit.recipe.yaml_nodes import Node, Position, parse_yaml, type_name

_STEP = re.compile(r"([^.\[\]=\s]{1,100})|\[(\d{1,9})\]")
_MAX_STEPS = 50


def merge(base: Node, over: Node, root: bool = False) -> Node:
    """Return ``base`` with ``over`` laid on top.

    Mappings merge key by key, anything else replaces. A mapping that names another entry
    (``name`` or ``source`` differs) replaces too: the options of one entry mean nothing to another.
    At the ``root`` a name is the recipe's own.

    Raises:
        RecipeError: options are laid over a list, and name no entry to take its place.
    """
    options = isinstance(over.value, dict) and not {"name", "source"} & over.value.keys()
    if isinstance(base.value, list) and base.value and options:
        raise RecipeError(
            f"{over.where}: there is a list in the recipe ({base.where}), which has no options to "
            "change: write the whole list here"
        )
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    for key in () if root else ("name", "source"):
        named = over.value.get(key)
        if named is not None and key in base.value and named.value != base.value[key].value:
            return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, base.where, {**base.keys, **over.keys})


def parse_path(text: str) -> RecipePath:
    """Split ``a.b[0].c`` (or ``a.b.0.c``) into its steps.

    Raises:
        RecipeError: the text is not such a path.
    """
    steps: list[str | int] = []
    position = 0
    while position < len(text):
        if len(steps) == _MAX_STEPS:
            raise RecipeError(f"--set {text[:60]}...: more than {_MAX_STEPS} steps")
        match = _STEP.match(text, position + bool(steps and text[position] == "."))
        if match is None:
            raise RecipeError(f"--set {text}: not a path such as synthesis.regularizers[0].weight")
        word, index = match.groups()
        is_index = index is not None or (word.isdecimal() and len(word) < 10)
        steps.append(int(index or word) if is_index else word)
        position = match.end()
    return tuple(steps)


def apply_override(root: Node, override: str) -> Node:
    """Return ``root`` with one ``--set path=value`` applied; the value is read as YAML.

    Raises:
        RecipeError: no ``=``, a path that leads through a scalar, or a list index out of range.
    """
    path_text, equals, value_text = override.partition("=")
    if not equals or not path_text:
        raise RecipeError(f"--set {override}: write it as path=value, e.g. synthesis.images=64")
    path = parse_path(path_text)
    where = Position(f"--set {format_path(path)}")
    value = parse_yaml(value_text, f"--set {override}", where)
    return _put(root, path, value, where, path_text)


def _put(node: Node, path: RecipePath, value: Node, where: Position, text: str) -> Node:
    if not path:
        return merge(node, value)
    step, rest = path[0], path[1:]
    if isinstance(node.value, list):
        if not isinstance(step, int) or step >= len(node.value):
            raise RecipeError(
                f"--set {text}: '{step}' is not an index of a list of {len(node.value)}"
            )
        children = list(node.value)
        children[step] = _put(children[step], rest, value, where, text)
        return Node(children, node.where)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(
            f"--set {text}: '{step}' leads into {type_name(node.value)}, not a mapping"
        )
    key = str(step)
    mapping = dict(node.value or {})
    missing = Node({} if rest else None, where)
    child = _put(mapping.get(key, missing), rest, value, where, text)
    return Node({**mapping, key: child}, node.where, {**node.keys, key: where})
