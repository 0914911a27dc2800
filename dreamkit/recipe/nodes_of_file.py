"""A recipe's file as nodes, before anything in it is given a meaning."""

from __future__ import annotations

from pathlib import Path

from dreamkit.errors import RecipeError, RecipePath
from dreamkit.recipe.problems import located
from dreamkit.recipe.yaml_nodes import Node, Position, parse_yaml, type_name

MAX_BYTES = 1_000_000
"""A recipe is written by hand; a larger file is a mistake."""


def read_nodes(file: Path) -> Node:
    """Return the nodes of a recipe's file.

    Raises:
        RecipeError: there are none, or they are of another kind.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{file}: {size} bytes is no recipe (limit {MAX_BYTES})")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not a UTF-8 text file") from error
    root = parse_yaml(text, str(file))
    mapping_in(root, ())
    return root


def mapping_in(node: Node, path: RecipePath) -> dict[str, Node]:
    """Return what a node maps.

    Raises:
        RecipeError: there are none, or they are of another kind.
    """
    if isinstance(node.value, dict):
        return node.value
    message = f"should be a mapping, not {type_name(node.value)}"
    raise RecipeError(f"{located(node.where, path)}: {message}")


def split_presets(root: Node) -> tuple[Node, dict[str, Node]]:
    """Return a recipe's nodes without its presets, and those by name.

    Raises:
        RecipeError: there are none, or they are of another kind.
    """
    rest = {key: node for key, node in root.value.items() if key != "presets"}
    node = root.child("presets")
    presets = {} if node is None or node.value is None else mapping_in(node, ("presets",))
    for name, overlay in presets.items():
        mapping_in(overlay, ("presets", name))
    return Node(rest, root.where, root.keys), presets


def plugin_names(root: Node) -> list[str]:
    """Return the plugins that a recipe names.

    Raises:
        RecipeError: there are none, or they are of another kind.
    """
    node = root.value.get("plugins", Node([], Position("")))
    if not isinstance(node.value, list) or not all(isinstance(n.value, str) for n in node.value):
        place = located(node.where, ("plugins",))
        raise RecipeError(f"{place}: should be a list of modules or .py files")
    return [child.value for child in node.value]
