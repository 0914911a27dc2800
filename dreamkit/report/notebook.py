"""Results as they show themselves in a terminal and in a notebook's cell."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from dreamkit.report.figures import as_png
from dreamkit.report.tables import continual_rows, judge_rows, quantization_rows, summary_rows
from dreamkit.types import DreamsPictured, Event
from dreamkit.wording import say

_SHOWN = 8
"""Lines of a result that has no table."""


def _tables(report: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    each = (summary_rows, quantization_rows, continual_rows, judge_rows)
    found = [table(report) for table in each]
    return [(header, rows) for header, rows in found if rows]


def as_text(name: str, report: Mapping[str, Any], seconds: float) -> str:
    """Return a few lines: the table, or the first metrics where there is none.

    Args:
        name: of the result's class.
        report: ``metrics``, ``details``, ``notes`` and ``failures``, as in ``report.json``.
        seconds: that it took.
    """
    lines = [f"{name}, {seconds:.1f} s"]
    for header, rows in _tables(report):
        table = [header, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        for row in table:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append("  " + "  ".join(cells).rstrip())
    if len(lines) == 1:
        lines += [f"  {key} {value:.6g}" for key, value in list(report["metrics"].items())[:_SHOWN]]
    lines += [f"  FAILED: {failure}" for failure in report["failures"]]
    if report["notes"]:
        lines.append(f"  {len(report['notes'])} notes in .notes")
    return "\n".join(lines)


def as_html(
    name: str, report: Mapping[str, Any], seconds: float, picture: Image.Image | None = None
) -> str:
    """Return the same as HTML, with a picture.

    Args:
        name: of the result's class.
        report: as of ``as_text``.
        seconds: that it took.
        picture: shown below the tables.
    """
    parts = [f"<p><b>{escape(name)}</b>, {seconds:.1f} s</p>"]
    tables = _tables(report)
    if not tables and report["metrics"]:
        rows = [[key, f"{value:.6g}"] for key, value in list(report["metrics"].items())[:_SHOWN]]
        tables = [(["metric", "value"], rows)]
    for header, rows in tables:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    parts += [f"<p><b>Failed:</b> {escape(failure)}</p>" for failure in report["failures"]]
    if report["notes"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
        parts.append(f"<details><summary>notes</summary><ul>{notes}</ul></details>")
    if picture is not None:
        style = "image-rendering: pixelated; max-width: 100%"
        parts.append(f'<img style="{style}" alt="dreamed images" src="{data_uri(picture)}">')
    return "\n".join(parts)


def data_uri(picture: Image.Image) -> str:
    """Return a picture as text that an HTML page holds."""
    return "data:image/png;base64," + base64.b64encode(as_png(picture)).decode()


class LivePicture:
    """Hears of the dreams' picture and shows it: in a notebook, in the cell, in place.

    Elsewhere a line tells once where it lies.

    Args:
        console: where people look.
        kept: whether the file is there after the run.
    """

    def __init__(self, console: Console, kept: bool = True) -> None:
        self.console = console
        self.kept = kept
        self._shown: dict[Path, Any] = {}

    def __call__(self, event: Event) -> None:
        """Show a picture."""
        if not isinstance(event, DreamsPictured):
            return
        if self.console.is_jupyter:
            self._show_in_cell(event)
        elif self.kept and event.path not in self._shown:
            self._shown[event.path] = None
            say(self.console, f"picture of the dreams so far: {event.path}")

    def _show_in_cell(self, event: DreamsPictured) -> None:
        cells = importlib.import_module("IPython.display")  # a notebook has it
        picture = cells.Image(data=event.png, format="png")
        if event.path in self._shown:
            self._shown[event.path].update(picture)
        else:
            self._shown[event.path] = cells.display(picture, display_id=True)
