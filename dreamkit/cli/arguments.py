"""Arguments and options that several commands take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dreamkit.plugins import build_registries
from dreamkit.registry import Registries

if TYPE_CHECKING:  # it imports torch
    from dreamkit.types import Teacher

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
    str,
    typer.Argument(
        metavar="NETWORK",
        help="SOURCE:MODEL, e.g. timm:resnet50; a recipe's file or name, whose teacher is taken; "
        "or the folder of a saved student.",
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Compute on this device.")]


def load_network(
    option: str,
    text: str,
    plugins: list[str] | None,
    weights: Literal["default", "null"] | None = None,
    preset: str | None = None,
    overrides: list[str] | None = None,
) -> tuple[Teacher, Registries]:
    """Return the network that a command is told of, and the registries it is from."""
    from dreamkit.teachers.network_name import NetworkName
    from dreamkit.teachers.network_name import load_network as load

    name = NetworkName(option, text, weights, preset, tuple(overrides or ()))
    return load(name, lambda named: registries_with([*named, *(plugins or [])]))


def registries_with(plugins: list[str] | None) -> Registries:
    """Return the registries with these plugins, warning of installed ones that failed."""
    registries = build_registries(plugins or [])
    warn_of_failures(registries)
    return registries


def warn_of_failures(registries: Registries) -> None:
    """Name the installed plugins that could not be loaded."""
    for failure in registries.failures:
        print(f"warning: plugin {failure.plugin} is left out: {failure.reason}", file=sys.stderr)
