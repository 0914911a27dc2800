"""The teacher of a recipe alone: commands that look at networks need no more of it to be valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dreamkit.errors import DreamkitError, RecipeError, placed
from dreamkit.recipe.construct import Builder
from dreamkit.recipe.problems import located
from dreamkit.recipe.schema import chosen_nodes, registries_of
from dreamkit.recipe.yaml_nodes import Node
from dreamkit.registry import Registries


@dataclass(frozen=True)
class RecipeTeacher:
    """A recipe's entry under ``teacher``, checked.

    Args:
        source: the entry; ``load`` it.
        root: the recipe's nodes.
        registries: with the recipe's plugins.
    """

    source: Any
    root: Node
    registries: Registries

    def load(self) -> Any:
        """Return the teacher, on the CPU.

        Raises:
            DreamkitError: it cannot be loaded, with the place in the recipe.
        """
        seed = self.root.plain().get("seed", 0)
        try:
            with placed("teacher"):
                return self.source.load(seed if type(seed) is int and 0 <= seed < 2**63 else 0)
        except DreamkitError as error:
            place = located(self.root.place(error.path), error.path)
            raise type(error)(f"{place}: {error.message}") from error


def read_teacher(
    file: Path,
    build_registries: Callable[[Sequence[str]], Registries],
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> RecipeTeacher:
    """Read and check a recipe's teacher.

    Args:
        file: the YAML file.
        build_registries: given the recipe's plugins, returns the registries to check against.
        preset: as of ``read_recipe``.
        overrides: as of ``read_recipe``.

    Raises:
        RecipeError: the file is no recipe, or its teacher is not valid.
        PluginError: a plugin that it names cannot be loaded.
    """
    root = chosen_nodes(file, preset, overrides)[0]
    plain = root.plain()
    if "teacher" not in plain:
        raise RecipeError(f"{file}: it has no 'teacher', so there is no network to look at")
    registries = registries_of(root, build_registries)
    builder = Builder(registries)
    source, problems = builder.build(partial(builder.entry, "teachers"), plain["teacher"])
    found = [replace(p, path=("teacher", *p.path)) for p in problems]
    placed_there = [replace(p, place=root.place(p.path, p.unknown)) for p in found]
    if placed_there:
        raise RecipeError("\n".join(map(str, placed_there)))
    return RecipeTeacher(source, root, registries)
