"""Runs of recipes as the cells of a table: finished ones are read, interrupted ones go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.runner import run
from dreamkit.store.run_directory import read_report

RECIPES = Path(__file__).parents[1] / "recipes"


def run_recipe(
    file: Path, preset: str | None, changes: Sequence[str], folder: Path, console: Console
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a recipe, or read its finished run; return its metrics and the recipe as it ran.

    Args:
        file: the recipe.
        preset: of it.
        changes: as of ``dreamkit run --set``.
        folder: the run directory.
        console: where progress is shown.
    """
    loaded = read_recipe(file, build_registries, preset, list(changes))
    console.print(f"\n{folder.name}", highlight=False)
    metrics: dict[str, float] = read_report(run(loaded, folder, console))["metrics"]
    return metrics, loaded.root.plain()


def spread(values: Sequence[float], digits: int) -> str:
    """Write a mean, and the deviation of several."""
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"
