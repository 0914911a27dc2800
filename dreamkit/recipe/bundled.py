"""The recipes that come with dreamkit, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dreamkit.errors import RecipeError, did_you_mean
from dreamkit.recipe.yaml_nodes import parse_yaml

_FACTS = ("needs", "takes")
"""Lines of a recipe's first comment that say what it needs and how long it takes."""


def recipe_folder() -> Path:
    """Return where they lie: inside an installed package, beside it in a clone."""
    package = Path(str(resources.files("dreamkit")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Return every recipe's file by its name: its path there without ``.yaml``."""
    folder = recipe_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(named: str) -> Path:
    """Return the file that a path or the name of a bundled recipe stands for.

    Args:
        named: a file of one's own goes first; else ``quickstart``, ``cifar10/prune_ha``, with or
            without ``recipes/`` before and ``.yaml`` behind.

    Raises:
        RecipeError: there is neither.
    """
    file = Path(named)
    if file.is_file():
        return file
    known = bundled_recipes()
    name = named.removeprefix("recipes/").removesuffix(".yaml")
    if name in known:
        found, here = known[name], Path.cwd()
        return found.relative_to(here) if found.is_relative_to(here) else found
    ends = [whole for whole in known if whole.endswith(f"/{name}")]
    hint = f"; did you mean '{ends[0]}'?" if ends else did_you_mean(name, known)
    if not hint and (file.suffix or file.exists() or len(file.parts) > 1):
        return file  # whoever reads it says why that cannot be
    raise RecipeError(
        f"no file '{named}', and no recipe of that name comes with dreamkit{hint} "
        "('dreamkit recipes' lists them)"
    )


def describe(file: Path) -> dict[str, str]:
    """Return a recipe's ``description``, ``teacher``, ``presets``, ``needs`` and ``takes``.

    What it needs and how long it takes are lines of its first comment: ``# Needs: ...`` and
    ``# Takes: ...``.
    """
    text = file.read_text(encoding="utf-8")
    recipe = parse_yaml(text, str(file)).plain()
    comment = [line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#"]
    pairs = [line.partition(": ") for line in comment]
    said = {key.lower(): value for key, _, value in pairs if key.lower() in _FACTS}
    teacher = f"{recipe['teacher']['source']}:{recipe['teacher']['model']}"
    facts = {"description": recipe["description"], "teacher": teacher}
    facts["presets"] = ", ".join(recipe.get("presets") or ())
    return facts | {key: said.get(key, "") for key in _FACTS}
