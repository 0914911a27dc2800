"""Looking a network up: ``SOURCE:MODEL``, e.g. ``timm:resnet50``, or a recipe's, or a student."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.recipe import build_entry
from dreamkit.recipe.bundled import bundled_recipes, find_recipe
from dreamkit.recipe.teacher import read_teacher
from dreamkit.registry import Registries, UnknownEntry
from dreamkit.types import Teacher

Weights = Literal["default", "null"]
"""``null`` for random ones."""
_SEED = 0


def listing_source(registries: Registries, name: str) -> type[Any]:
    """Return a source of teachers that can list its models and needs only a model's name."""
    teachers = registries["teachers"]
    try:
        cls = teachers.resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    if cls.known_models(pretrained=False) is None:
        raise DreamkitError(f"the source '{name}' has no list of models; use timm or torchvision")
    return cls


def split_name(option: str, named: str) -> tuple[str, str]:
    """Return source and model of ``SOURCE:MODEL``.

    Raises:
        DreamkitError: it is written otherwise; ``option`` says where.
    """
    source, _, model = named.partition(":")
    if not model:
        raise DreamkitError(f"{option} {named}: write SOURCE:MODEL, e.g. torchvision:mobilenet_v2")
    return source, model


def teacher_options(
    registries: Registries, source: str, model: str, weights: Weights
) -> dict[str, Any]:
    """Return the options that make a source's entry of a model: ``model`` and mostly ``weights``.

    Raises:
        DreamkitError: there is no such source or model, or no weights of it.
    """
    cls = listing_source(registries, source)
    options: dict[str, Any] = {"model": model}
    if "weights" in inspect.signature(cls).parameters:
        options["weights"] = "default" if weights == "default" else None
    try:
        cls(**options)
    except OptionError as error:
        raise DreamkitError(f"{source}:{model}: {error}") from error
    return options


def load_teacher(registries: Registries, source: str, model: str, weights: Weights) -> Teacher:
    """Return a teacher on the CPU; one that ships with its weights has them in any case.

    Raises:
        DreamkitError: there is no such source or model, or its weights do not come.
    """
    options = teacher_options(registries, source, model, weights)
    teacher: Teacher = listing_source(registries, source)(**options).load(_SEED)
    return teacher


def load_named(registries: Registries, option: str, named: str, weights: Weights) -> Teacher:
    """Return the teacher that ``SOURCE:MODEL`` names.

    Raises:
        DreamkitError: as ``load_teacher`` does, or it is written otherwise; ``option`` says where.
    """
    return load_teacher(registries, *split_name(option, named), weights)


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
        teacher: Teacher = entry.load(_SEED)
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
