"""Commands on recipes: run, validate, new."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dreamkit.cli.arguments import (
    Overrides,
    Plugins,
    Preset,
    RecipeName,
    registries_with,
    warn_of_failures,
)
from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.wording import first_line

if TYPE_CHECKING:
    from dreamkit.recipe import LoadedRecipe


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, the name of a recipe that comes with dreamkit, e.g. quickstart, "
            "or with --resume a run directory.",
        ),
    ],
    preset: Preset = None,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write into this folder [default: runs/NAME[-PRESET]].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; fail if there is none.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps, say what dreaming costs, and stop.")
    ] = False,
) -> None:
    """Run a recipe.

    Given again, the command goes on where an interrupted run of the same recipe ended. With
    `--resume` and the run directory, no other option has to be remembered.

    Examples:

        dreamkit run quickstart

        dreamkit run prune_resnet50_ha --preset smoke --set teacher.weights=null

        dreamkit run my.yaml --set synthesis.images=64 --out runs/try

        dreamkit run --resume runs/try
    """
    loaded, folder = _load(recipe, preset, set_ or [], out, resume)
    warn_of_failures(loaded.registries)
    _run(loaded, folder, resume, dry)


def _run(loaded: LoadedRecipe, folder: Path, resume: bool, dry: bool) -> None:
    """Run a recipe on every rank; a run that was stopped says how to go on."""
    from dreamkit import distributed
    from dreamkit.runner import dry_run
    from dreamkit.runner import run as run_recipe
    from dreamkit.stopping import Stop
    from dreamkit.store.run_directory import read_report

    stop = Stop()
    try:
        if dry:
            with distributed.ranks():
                if distributed.is_first():
                    dry_run(loaded, folder, Console())
            return
        with stop.listening(), distributed.ranks():
            console = Console(quiet=not distributed.is_first())
            run_recipe(loaded, folder, console, resume, stop.asked)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise
        ended = f"rank {os.environ.get('RANK')} ends: another rank is gone, or torch failed"
        print(f"{ended}: {first_line(error)}", file=sys.stderr)
        raise typer.Exit(stop.status if stop.asked() else 1) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            again = shlex.join(["dreamkit", *sys.argv[1:]])
            print(f"interrupted: what was finished is kept; go on with\n  {again}", file=sys.stderr)
        raise typer.Exit(stop.status) from None
    if read_report(folder).get("failures"):
        raise typer.Exit(1)


def _load(
    named: str, preset: str | None, overrides: list[str], out: Path | None, resume: bool
) -> tuple[LoadedRecipe, Path]:
    """Return the recipe and its run directory; a run directory has its recipe in it."""
    from dreamkit.recipe import read_recipe
    from dreamkit.recipe.bundled import bundled_recipes, find_recipe
    from dreamkit.runner import default_folder
    from dreamkit.store.run_directory import RECIPE, stored_preset

    folder = Path(named)
    stored = folder / RECIPE
    if not stored.is_file():
        if resume and folder.is_dir() and named not in bundled_recipes():
            raise DreamkitError(f"{folder} holds no run to resume (no {RECIPE})")
        loaded = read_recipe(find_recipe(named), build_registries, preset, overrides)
        return loaded, out or default_folder(loaded)
    if not resume:
        raise DreamkitError(
            f"{folder} is a run directory: go on with 'dreamkit run --resume {folder}', or name a "
            "recipe"
        )
    if preset is not None or overrides or out is not None:
        raise DreamkitError(
            f"--resume {folder} goes on with the recipe that is stored there: leave --preset, "
            "--set and --out out"
        )
    return replace(read_recipe(stored, build_registries), preset=stored_preset(folder)), folder


def validate(recipe: RecipeName, preset: Preset = None, set_: Overrides = None) -> None:
    """Check a recipe with all its presets. Load no network and no images.

    Examples:

        dreamkit validate quickstart

        dreamkit validate my.yaml --preset paper --set synthesis.images=64
    """
    from dreamkit.recipe import validate_recipe
    from dreamkit.recipe.bundled import find_recipe

    file = find_recipe(recipe)
    registries, lines = validate_recipe(file, build_registries, preset, set_ or [])
    warn_of_failures(registries)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    print(f"{file} is valid")


def new(
    file: Annotated[Path, typer.Argument(help="The recipe to write. It must not exist yet.")],
    application: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="APPLICATION",
            help="Start from this application, e.g. synthesize, distill, prune or recover.",
        ),
    ] = "synthesize",
    teacher: Annotated[
        str, typer.Option(metavar="SOURCE:MODEL", help="Use this trained network.")
    ] = "bundled:digits_resnet8",
    plugin: Plugins = None,
) -> None:
    """Write a commented recipe to start from.

    It suits the size of the teacher's images, and `dreamkit validate` passes it.

    Examples:

        dreamkit new my.yaml --from prune --teacher timm:resnet18

        dreamkit new first.yaml
    """
    from dreamkit.starters.writing import write_starter

    write_starter(registries_with(plugin), file, application, teacher)
    print(f"{file} written; check it with 'dreamkit validate {file}', then 'dreamkit run {file}'")
