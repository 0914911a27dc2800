"""What a class says of itself, read from its source."""

from __future__ import annotations

import ast
import importlib.util


def docstring_of(target: str) -> str | None:
    """Return a class's docstring as its module's source has it, which needs none of its imports."""
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        source = getattr(spec and spec.loader, "get_source", lambda module: None)(module)
        tree = ast.parse(source or "")
    except (Exception, SystemExit):  # looking for it runs the packages above
        return None
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next((ast.get_docstring(node) for node in classes), None)
