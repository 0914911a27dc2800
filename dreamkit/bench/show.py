"""The benchmark's figures for people: a line, a table, a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreamkit.bench.results import Settings, TeacherRow, read_results
from dreamkit.report.figures import scatter
from dreamkit.report.tables import quantity
from dreamkit.store.atomic import write_atomically
from dreamkit.wording import say

EXPLANATION = (
    "FLOPs count a multiply-add once; latency is of one image; images/s = batch size / (steps * "
    "seconds per step); peak memory is the process's on a CPU, torch's on a GPU; dist. is how far "
    "statistics are from training's (1: as near as an equal number of training images)"
)
_COLUMNS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("bn_layers", "BN\nlayers", "{} BN layers", str),
    ("params", "params", "{} parameters", quantity),
    ("flops", "FLOPs", "{} FLOPs", quantity),
    ("latency_ms", "latency\nms", "{} ms", "{:.3g}".format),
    ("seconds_per_step", "s/step", "{} s/step", "{:.3g}".format),
    ("images_per_second", "images\n/s", "{} images/s", "{:.3g}".format),
    ("memory_bytes", "peak\nGB", "{} GB", lambda value: f"{value / 2**30:.2f}"),
    ("statistics_distance", "dist.", "statistics distance {}", "{:.2f}".format),
    ("cross_model_accuracy", "cross-\nmodel", "cross-model accuracy {}", "{:.3f}".format),
)
"""Field, title of its column, how a line says it, and how it is written."""


def summary(row: TeacherRow) -> str:
    """Return a row as one line."""
    figures = [
        said.format(write(getattr(row, key)))
        for key, _, said, write in _COLUMNS
        if getattr(row, key) is not None
    ]
    parts = [part for part in (", ".join(figures), "; ".join(row.reasons)) if part]
    return f"{row.name}: {'; '.join(parts)}"


def show(rows: Sequence[TeacherRow], settings: Settings, console: Console) -> None:
    """Print a table of rows, without columns that nothing stands in, and why figures are missing.

    The reasons stand below the table: beside it they would leave the figures no room.
    """
    columns = [c for c in _COLUMNS if any(getattr(row, c[0]) is not None for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("teacher", overflow="fold")
    for _, title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [(write, getattr(row, key)) for key, _, _, write in columns]
        cells = ["" if value is None else write(value) for write, value in values]
        table.add_row(escape(row.name), *cells)
    console.print(table)
    for row in rows:
        if row.reasons:
            say(console, f"{row.name}: {'; '.join(row.reasons)}")
    how = f"batch size {settings.batch_size}, {settings.steps} steps, on {settings.device}"
    say(console, f"{how}; {EXPLANATION}")


def draw(path: Path, settings: Settings) -> Path | None:
    """Draw cost against quality of every row of a file, as an SVG file beside it.

    Cost is seconds per image. Quality is cross-model accuracy where any is known, else the distance
    of statistics; where neither is, the teacher's size takes its place: FLOPs, else parameters.

    Returns:
        The picture; None where no row has both.
    """
    rows = read_results(path, settings).teachers
    for key, title in (
        ("cross_model_accuracy", "cross-model accuracy (higher is better)"),
        ("statistics_distance", "distance of statistics (1: as near as training images)"),
        ("flops", "FLOPs of an image (quality is not known)"),
        ("params", "parameters (quality is not known)"),
    ):
        points: dict[str, dict[str, tuple[float, float]]] = {}
        for row in rows:
            value = getattr(row, key)
            if value is not None and row.images_per_second:
                group = points.setdefault(row.source, {})
                group[row.model] = (1 / row.images_per_second, value)
        if points:
            cost = f"seconds per image (batches of {settings.batch_size}, {settings.steps} steps)"
            picture = path.with_suffix(".svg")
            write_atomically(picture, scatter(points, cost, title).encode())
            return picture
    return None
