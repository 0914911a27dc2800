"""What a finished run leaves for people: its report, as data and as a page."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dreamkit.errors import RunDirectoryError
from dreamkit.latency.processor import processor_name
from dreamkit.recipe import LoadedRecipe
from dreamkit.report.figures import as_png, grid
from dreamkit.report.html import render
from dreamkit.report.run_log import FileLog, read_records
from dreamkit.report.tables import (
    continual_rows,
    dreams_line,
    fidelity_line,
    judge_rows,
    noise_line,
    quantization_rows,
    summary_rows,
)
from dreamkit.store.atomic import write_atomically
from dreamkit.store.dreams import DreamStore, holds_dreams, picture_of
from dreamkit.store.run_directory import PAGE, RunDirectory
from dreamkit.types import RunContext, Teacher
from dreamkit.version import __version__
from dreamkit.wording import say

_PICTURED = 512
"""Images that the grid is picked from."""
_VERSIONS = ("torch", "torchvision", "timm", "numpy")


def build_report(
    loaded: LoadedRecipe, teacher: Teacher, context: RunContext, log: FileLog
) -> dict[str, Any]:
    """Return what ``report.json`` holds."""
    versions = {"dreamkit": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _VERSIONS}
    device = context.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "name": loaded.recipe.name,
        "description": loaded.recipe.description,
        "preset": loaded.preset,
        "application": loaded.root.plain()["application"]["name"],
        "seed": context.seed,
        "device": f"{device} ({name}), {torch.get_num_threads()} threads",
        "teacher": teacher.card.to_json(),
        "metrics": dict(sorted(log.metrics.items())),
        "notes": log.notes,
        "failures": log.failures,
        "seconds": log.seconds,
        "details": log.details,
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_pages(
    report: dict[str, Any], directory: RunDirectory, note: Callable[[str], None]
) -> None:
    """Write ``dreams.png``, ``report.html`` and, last, ``report.json``: it ends the run.

    Every store of dreams has its picture beside it; one that cannot be written is noted.
    """
    folder = directory.folder
    pictures: dict[str, Image.Image] = {}
    for store in filter(holds_dreams, sorted(folder.glob(f"**/{RunContext.DREAMS}"))):
        content = DreamStore(store).open(_PICTURED)
        picture = grid(*content.batch(range(min(len(content), _PICTURED))))
        try:
            write_atomically(picture_of(store), as_png(picture))
        except (OSError, RunDirectoryError) as error:
            note(f"the picture of the dreams is in the report alone: {error}")
        place = " / ".join(store.parent.relative_to(folder).parts)
        pictures[f"Dreams of {place}" if place else "Dreams"] = picture
    page = render(report, read_records(folder), directory.recipe() or "", pictures)
    write_atomically(folder / PAGE, page.encode())
    directory.write_report(report)


def show(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print a report's tables and where its files are."""
    for rows_of in (summary_rows, quantization_rows, continual_rows, judge_rows):
        header, rows = rows_of(report)
        if not rows:
            continue
        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in (dreams_line(report), noise_line(report), fidelity_line(report)):
        if line is not None:
            say(console, line)
    for failure in report.get("failures", []):
        say(console, f"FAILED: {failure}")
    say(console, f"report: {folder / 'report.html'}")
