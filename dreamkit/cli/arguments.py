"""Arguments and options that several commands take."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from dreamkit.plugins import build_registries
from dreamkit.registry import Registries

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a recipe that comes with dreamkit, e.g. quickstart.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Use a preset of the recipe, e.g. smoke. Join several with +: smoke+mine."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: synthesis.images=64 (repeatable)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Load this module or .py file as well (repeatable)."),
]
TeacherName = Annotated[
    str, typer.Argument(metavar="SOURCE:MODEL", help="The network, e.g. timm:resnet50.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Compute on this device.")]


def registries_with(plugins: list[str] | None) -> Registries:
    """Return the registries with these plugins, warning of installed ones that failed."""
    registries = build_registries(plugins or [])
    warn_of_failures(registries)
    return registries


def warn_of_failures(registries: Registries) -> None:
    """Name the installed plugins that could not be loaded."""
    for failure in registries.failures:
        print(f"warning: plugin {failure.plugin} is left out: {failure.reason}", file=sys.stderr)
