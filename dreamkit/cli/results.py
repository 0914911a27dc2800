"""Commands on what a run leaves: export, export-dreams, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dreamkit.errors import DreamkitError


def export(
    run_directory: Annotated[
        Path, typer.Argument(help="A finished run's directory, or its student folder.")
    ],
    format_: Annotated[
        str,
        typer.Option("--format", help="Write this kind of file."),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Write to this file [default: beside the student].")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Fix the batch size [default: any number of images].")
    ] = None,
    allow_builder: Annotated[
        bool, typer.Option(help="Run the builder function that the student names. Trust it first.")
    ] = False,
    builder: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE:FUNCTION",
            help="Build the unpruned network by this function, in place of the one that the "
            "student names: path/to/file.py:make_net or package.module:make_net.",
        ),
    ] = None,
) -> None:
    """Export a run's student, run the file, and compare it with the model.

    A file that disagrees with the model is not kept.

    Examples:

        dreamkit export runs/quickstart

        dreamkit export runs/quickstart --format torch-export --batch-size 1
    """
    from dreamkit.deploy.exporting import export_student, show_exported
    from dreamkit.report.run_log import ConsoleLog
    from dreamkit.students import BuilderNeeded

    console = Console()
    try:
        with ConsoleLog(console).progress("exporting", 1):
            found = export_student(run_directory, format_, out, batch_size, allow_builder, builder)
    except BuilderNeeded as error:
        words = ("pass --allow-builder", "pass --builder path/to/file.py:function")
        raise error.in_words(*words) from error
    show_exported(found, console)


def export_dreams(
    run_directory: Annotated[Path, typer.Argument(help="A run directory, or its dreams folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write to, empty or new.")],
    kind: Annotated[
        Literal["imagefolder", "npy", "tensors"],
        typer.Option(
            "--as",
            help="imagefolder: PNG files, one folder a class. npy: normalised float32. tensors: "
            "uint8, as safetensors.",
        ),
    ] = "imagefolder",
) -> None:
    """Write a run's dreams for other tools, with how to normalise them beside.

    torchvision's `ImageFolder` reads the PNG files, and so does the source `folder`. Calibration
    tools of other runtimes take `images.npy`. `normalisation.json` has mean, std and size.

    Examples:

        dreamkit export-dreams runs/quickstart digits_dreamed

        dreamkit export-dreams runs/quickstart calibration --as npy
    """
    from dreamkit.api.dreams import card_of
    from dreamkit.store.calibration_sets import write_calibration_set
    from dreamkit.store.dreams import DreamStore
    from dreamkit.store.picture_files import export_dreams as export_pictures
    from dreamkit.store.source import find_store

    folder = find_store(run_directory)
    store = DreamStore(folder)
    try:
        card = card_of(store, folder)
    except DreamkitError:
        if kind != "imagefolder":
            raise
        print(f"{export_pictures(store, out, None)} images written to {out}")
        return
    print(f"{write_calibration_set(store.open(), out, card, kind)} images written to {out}")


def verify(
    run_directory: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
) -> None:
    """Check a run's dreams, students and checkpoints against their SHA-256.

    The exit status is 1 if anything is damaged.

    Example:

        dreamkit verify runs/quickstart
    """
    from dreamkit.checkup.verifying import show_findings, verify_run
    from dreamkit.report.run_log import ConsoleLog

    console = Console()
    with ConsoleLog(console).progress("verifying", 1):
        found = verify_run(run_directory)
    if not show_findings(found, console):
        raise typer.Exit(1)
