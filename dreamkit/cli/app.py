"""The program: its commands in the order of its help, and how a user's mistake ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dreamkit.cli import look, measure, results, run
from dreamkit.cli.streams import restart_in_utf8, standard_streams
from dreamkit.errors import DreamkitError
from dreamkit.plugins import with_commands
from dreamkit.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Move knowledge out of a trained network when its training data is gone.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "Run": {"run": run.run, "validate": run.validate, "new": run.new},
    "Look": {
        "recipes": look.recipes,
        "list": look.list_entries,
        "show": look.show,
        "plugins": look.plugins,
        "schema": look.schema,
    },
    "Use results": {
        "export": results.export,
        "export-dreams": results.export_dreams,
        "verify": results.verify,
    },
    "Measure": {"doctor": measure.doctor},
}
"""Every command by its name, under the heading that it stands under in the help."""

for _heading, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_heading)(_command)
app.add_typer(measure.bench, name="bench", rich_help_panel="Measure")
app.add_typer(measure.lut, name="lut", rich_help_panel="Measure")


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2."""
    restart_in_utf8()
    with standard_streams():
        _main()


def _main() -> None:
    try:
        program, failures = with_commands(app)
        for failure in failures:
            message = f"warning: plugin {failure.plugin} adds no commands: {failure.reason}"
            print(message, file=sys.stderr)
        program()
    except DreamkitError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"dreamkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
