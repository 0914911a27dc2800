"""A latency table's file: its points, and the target that they hold for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dreamkit.errors import DreamkitError
from dreamkit.latency.table import LookUpTable
from dreamkit.types import LatencyBackend, LayerShape, Timing

FORMAT = 3
_SHAPES = TypeAdapter(LayerShape)


def table_text(table: LookUpTable) -> str:
    """Return a table as JSON, with what its figures hold for.

    Points stand one a line and in an order of their own, so that two tables can be compared.
    """
    facts = {"format": FORMAT, "target": table.backend.describe()}
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    points = sorted(table.points.items(), key=lambda pair: _place(pair[0]))
    rows = [json.dumps({**asdict(shape), **asdict(timing)}) for shape, timing in points]
    lines = ",\n".join(f"  {row}" for row in rows)
    return f'{head},\n "points": [\n{lines}\n ]\n}}\n'


def _place(shape: LayerShape) -> tuple[Any, ...]:
    """Return what tables are sorted by: points of one layer lie together."""
    facts = asdict(shape)
    counts = [facts.pop(name) for name in ("groups", "c_in", "c_out")]
    return (*facts.values(), *counts)


def read_table(
    path: Path,
    backend: LatencyBackend,
    strict: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> LookUpTable:
    """Read a table.

    Args:
        path: its file.
        backend: the target it must have been measured on.
        strict: refuse a file that does not serve. Else a table is a cache: one that is absent,
            damaged or of another target is an empty one.
        note: told of a table that is there and not used.

    Raises:
        DreamkitError: the file does not serve, and ``strict`` is set.
    """
    here = backend.describe()
    try:
        target, points = read_file(path)
    except DreamkitError as error:
        if strict:
            raise
        if path.exists():
            note(f"{error}; its layers are measured again")
        return LookUpTable(backend)
    if target == here:
        return LookUpTable(backend, points)
    keys = sorted(target.keys() | here.keys())
    other = [
        f"{key} {target.get(key)} there, {here.get(key)} here"
        for key in keys
        if target.get(key) != here.get(key)
    ]
    told = f"{path} was measured on another target ({'; '.join(other)})"
    if strict:
        raise DreamkitError(f"{told}: measure it here with 'dreamkit lut build'")
    note(f"{told}: its layers are measured again, and the file is written anew")
    return LookUpTable(backend)


def read_file(path: Path) -> tuple[dict[str, str], dict[LayerShape, Timing]]:
    """Return what a table was measured on, as a backend describes it, and its points.

    Raises:
        DreamkitError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(
                f"format {data['format']}, this version reads {FORMAT}; delete it, and measure "
                "again with 'dreamkit lut build'"
            )
        target = {str(key): str(value) for key, value in data["target"].items()}
        points = {}
        for row in data["points"]:
            timing = Timing(float(row.pop("median_ms")), float(row.pop("spread_ms")))
            shape = _SHAPES.validate_python(row)
            if not 0 < timing.median_ms < math.inf:
                raise ValueError(f"a layer takes {timing.median_ms} ms")
            if len(shape.feature_map) != (0 if shape.kind == "linear" else 2):
                raise ValueError(f"a {shape.kind} on {shape.feature_map}")
            points[shape] = timing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DreamkitError(f"{path} cannot be read as a latency table: {error}") from error
    return target, points
