"""Runs of recipes as the cells of a table: finished ones are read, interrupted ones go on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from dreamkit.latency.processor import processor_name
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


def add_budget(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of a table of recipes that are run by one preset.

    Args:
        parser: of the script.
        out: where its runs go.
    """
    parser.add_argument("--preset", default="draft", help="the budget: smoke, draft, paper")
    add_runs(parser, out)


def add_runs(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that every table of recipes has.

    Args:
        parser: of the script.
        out: where its runs go.
    """
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="PATH=VALUE")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--quick", action="store_true", help="smoke presets")
    parser.add_argument("--json", type=Path, help="write every figure here")


def publish(options: argparse.Namespace, text: str, figures: dict[str, Any]) -> None:
    """Print a table below what it was measured on, and write its figures where that is asked for.

    Args:
        options: the script's.
        text: Markdown.
        figures: as ``--json`` has them.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    threads = torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, preset {options.preset}, ")
    print(f"{len(options.seed)} seeds\n\n{text}")
    if options.json:
        data = {"processor": name, "preset": options.preset, "seeds": options.seed}
        options.json.write_text(
            json.dumps(data | {"changes": options.changes} | figures, indent=1) + "\n"
        )


def spread(values: Sequence[float], digits: int) -> str:
    """Write a mean, and the deviation of several."""
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"
