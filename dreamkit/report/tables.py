"""The one table of a run: teacher, pruned, student, side by side."""

from __future__ import annotations

from collections.abc import Mapping

MODELS = ("teacher", "pruned", "student")
_COLUMNS = (
    ("accuracy", "accuracy"),
    ("agreement", "agrees on its training images"),
    ("params", "parameters"),
    ("flops", "FLOPs"),
    ("latency_ms", "latency"),
)


def summary_rows(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Return the table's header and rows, without those that nothing was measured for.

    A cell that does not apply is a dash.
    """
    shown = [
        (key, title)
        for key, title in _COLUMNS
        if any(f"{model}.{key}" in metrics for model in MODELS)
    ]
    rows = []
    for model in MODELS:
        cells = [_cell(key, metrics.get(f"{model}.{key}")) for key, _ in shown]
        if any(cell != "-" for cell in cells):
            name = "pruned, before recovery" if model == "pruned" else model
            rows.append([name, *cells])
    return ["model", *(title for _, title in shown)], rows


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in {"accuracy", "agreement"}:
        return f"{value:.4f}"
    if key == "latency_ms":
        return f"{value:.3f} ms"
    return quantity(value)


def quantity(value: float) -> str:
    """Write a count with three significant digits and k, M, G."""
    rounded = float(f"{value:.3g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded:.3g}"
