"""How commands are told of a network: ``SOURCE:MODEL``, a recipe's teacher, or a saved student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.recipe import build_entry
from dreamkit.recipe.bundled import bundled_recipes, find_recipe
from dreamkit.recipe.teacher import read_teacher
from dreamkit.registry import Registries
from dreamkit.teachers.named import Weights, load_named
from dreamkit.types import Teacher


@dataclass(frozen=True)
class NetworkName:
    """How a command is told of a network.

    Args:
        option: of the command, for messages.
        text: ``SOURCE:MODEL``, a recipe's file, the name of a bundled recipe, or the folder of a
            saved student or of its run.
        weights: of ``SOURCE:MODEL``; None for random ones. Recipes and students say it themselves.
        preset: of the recipe.
        overrides: of the recipe, as of ``--set``.
    """

    option: str
    text: str
    weights: Weights | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What tells it from others: its text, and what is laid over the recipe."""
        preset = [f"--preset {self.preset}"] if self.preset else []
        return " ".join([self.text, *preset, *(f"--set {change}" for change in self.overrides)])

    @property
    def is_recipe(self) -> bool:
        """Whether it stands for a recipe's teacher."""
        file = Path(self.text)
        return file.is_file() or file.suffix in {".yaml", ".yml"} or self.text in bundled_recipes()


def load_network(
    name: NetworkName, build_registries: Callable[[Sequence[str]], Registries]
) -> tuple[Teacher, Registries]:
    """Return the teacher that a command is told of, on the CPU, and the registries it is from.

    Args:
        name: what the command is told.
        build_registries: given a recipe's plugins, returns the registries.

    Raises:
        DreamkitError: there is no such network, it cannot be loaded, or it is told more of it than
            it can use.
    """
    if name.is_recipe:
        if name.weights is not None:
            raise DreamkitError(
                "--weights is for SOURCE:MODEL: a recipe says itself which weights its teacher "
                "has (for random ones: --set teacher.weights=null)"
            )
        found = read_teacher(find_recipe(name.text), build_registries, name.preset, name.overrides)
        return found.load(), found.registries
    if name.preset is not None or name.overrides:
        raise DreamkitError(
            f"--preset and --set are for recipes, and {name.option} {name.text} is none"
        )
    registries = build_registries(())
    folder = Path(name.text)
    if folder.is_dir():
        student = folder / "student" if (folder / "student").is_dir() else folder
        entry = build_entry(registries, "teachers", {"source": "student", "path": str(student)})
        teacher: Teacher = entry.load(seed=0)
        return teacher, registries
    try:
        return load_named(registries, name.option, name.text, name.weights or "null"), registries
    except OptionError:
        raise
    except DreamkitError as error:
        if ":" in name.text:
            raise
        raise DreamkitError(
            f"{error.message}, or a recipe's file or name: its teacher is taken then"
        ) from error
