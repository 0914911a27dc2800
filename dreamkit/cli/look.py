"""Commands that show what there is: recipes, list, show, plugins."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreamkit.cli.arguments import AsJson, Plugins, registries_with
from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.registry import KINDS, Registries, UnknownEntry
from dreamkit.wording import say


def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with dreamkit, and what each needs.

    Run one by its name, read it, or copy it: the list says where they lie.

    Examples:

        dreamkit recipes

        dreamkit recipes --json
    """
    from dreamkit.recipe.bundled import bundled_recipes, describe, recipe_folder

    files = bundled_recipes()
    rows = [{"recipe": name, **describe(file)} for name, file in files.items()]
    if as_json:
        _print_rows(rows, as_json)
        return
    console = Console()
    for row in rows:
        console.print(f"[bold]{escape(row['recipe'])}[/]", highlight=False)
        for key in ("description", "teacher", "presets", "needs", "takes"):
            if row[key]:
                text = row[key] if key == "description" else f"{key}: {row[key]}"
                say(console, textwrap.indent(textwrap.fill(text, console.width - 4), "    "))
    say(console, f"The files lie in {recipe_folder()}.")


def list_entries(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List every entry that recipes can name, and who provides it.

    Examples:

        dreamkit list

        dreamkit list regularizers --json
    """
    kinds = [_checked(kind)] if kind else list(KINDS)
    registries = registries_with(plugin)
    rows = [
        {
            "kind": k,
            "name": name,
            "provider": registries[k].provider(name),
            "summary": registries[k].summary(name),
        }
        for k in kinds
        for name in registries[k]
    ]
    _print_rows(rows, as_json)


def show(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    name: Annotated[str, typer.Argument(help="The entry's name.")],
    plugin: Plugins = None,
) -> None:
    """Show what an entry does, and its options.

    Examples:

        dreamkit show regularizers bn_feature

        dreamkit show applications prune
    """
    from dreamkit.recipe.signature import documentation

    registries = registries_with(plugin)
    registry = registries[_checked(kind)]
    try:
        cls = registry.resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    console = Console()
    console.print(f"{kind} {name} (from {registry.provider(name)})\n", highlight=False)
    console.print(documentation(cls), markup=False, highlight=False)
    _print_options(cls, registries, console)


def _print_options(cls: type[Any], registries: Registries, console: Console) -> None:
    from dreamkit.recipe.signature import documentation, option_rows

    try:
        options = option_rows(cls, registries)
    except TypeError as error:
        raise DreamkitError(f"its options cannot be read: {error}") from error
    if not options:
        return
    table = Table("option", "type", "range", "default")
    for option in options:
        table.add_row(option.name, escape(option.accepts), option.range, escape(option.default))
    console.print(table)
    for nested in (option.nested for option in options if option.nested is not None):
        console.print(
            f"\n{nested.__name__}: {documentation(nested)}", markup=False, highlight=False
        )
        _print_options(nested, registries, console)


def plugins(as_json: AsJson = False, plugin: Plugins = None) -> None:
    """List the plugins, what each provides, and those that failed to load.

    Examples:

        dreamkit plugins

        dreamkit plugins --plugin plugins/high_freq.py
    """
    registries = registries_with(plugin)
    rows: list[dict[str, Any]] = []
    for provider in registries.providers:
        own = [
            f"{kind}: {name}"
            for kind in KINDS
            for name in registries[kind]
            if registries[kind].provider(name) == provider
        ]
        if any(listening == provider for listening, _ in registries.listeners):
            own.append("hears of events")
        rows.append({"provider": provider, "status": "loaded", "entries": ", ".join(own)})
    rows += [
        {"provider": f.plugin, "status": "failed", "entries": f.reason} for f in registries.failures
    ]
    _print_rows(rows, as_json)


def schema(plugin: Plugins = None) -> None:
    """Print the JSON Schema of recipes, for an editor that completes and checks YAML.

    Example:

        dreamkit schema > recipe.schema.json
    """
    from dreamkit.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(registries_with(plugin)), indent=1))


def _checked(kind: str) -> str:
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise DreamkitError(f"no kind '{kind}'{hint} (kinds: {', '.join(KINDS)})")
    return kind


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row.values()))
        Console().print(table)
