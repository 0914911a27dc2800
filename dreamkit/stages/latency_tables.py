"""What a run knows of layers' latencies: what it measured itself, and a table that it was given."""

from __future__ import annotations

from pathlib import Path

from dreamkit.errors import placed
from dreamkit.latency.table import LookUpTable
from dreamkit.latency.table_file import read_table, table_text
from dreamkit.store.atomic import write_atomically
from dreamkit.types import RunContext


def read_tables(context: RunContext, given: str | None) -> LookUpTable:
    """Return the run's table with the points of a given one.

    Args:
        context: the run's.
        given: the path of another table.

    Raises:
        DreamkitError: that does not serve.
    """
    path = context.folder / RunContext.TABLE
    table = read_table(path, context.latency, note=context.log.note)
    if given is not None:
        with placed("latency_table"):
            known = read_table(Path(given), context.latency, strict=True)
        table.points = known.points | table.points
    table.progress = context.log.progress
    return table


def save_table(table: LookUpTable, context: RunContext) -> None:
    """Keep the run's table, if something was measured."""
    if table.points:
        write_atomically(context.folder / RunContext.TABLE, table_text(table).encode())
