"""The sweep: teacher after teacher, what is known written after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from dreamkit.bench.child import measure_in_child
from dreamkit.bench.measure import Task, verifier_name
from dreamkit.bench.results import Settings, TeacherRow, read_results, write_results
from dreamkit.bench.show import summary
from dreamkit.card import Card
from dreamkit.registry import Registries
from dreamkit.teachers.intake import admit
from dreamkit.teachers.network_name import NetworkName, load_network
from dreamkit.wording import say

RECIPE = "recipe"
"""Stands for a source where the teacher is a recipe's."""


def sweep(
    registries: Registries,
    selection: Sequence[tuple[str, str]],
    settings: Settings,
    path: Path,
    limit_seconds: float,
    console: Console,
    plugins: Sequence[str] = (),
    recipes: Mapping[str, NetworkName] = MappingProxyType({}),
) -> list[TeacherRow]:
    """Measure teachers one after another, writing what is known after each.

    Args:
        registries: where sources stand.
        selection: source and model of each; those that the file holds are left as they are,
            unless their weights did not come or they were given less time.
        settings: what the figures depend on.
        path: the file, which may be there already.
        limit_seconds: time for one teacher, the start of its process included.
        console: told of each teacher in one line.
        plugins: modules or files that made the registries what they are.
        recipes: how networks of the source ``recipe`` are told of, by their labels.

    Returns:
        The rows of the selection, in the order in which they were measured.

    Raises:
        DreamkitError: the file is damaged, of other settings or cannot be written, or the
            verifier cannot be had.
    """
    results = read_results(path, settings)
    rows = {(row.source, row.model): row for row in results.teachers}
    kept = {key for key in selection if key in rows and rows[key].stands(limit_seconds)}
    if kept:
        say(console, f"resuming: {len(kept)} of {len(selection)} teachers kept from {path}")
    left = len(kept) < len(selection)
    # Here, so that no teacher's time is spent on a download or a mistake.
    verifier = _verifier(registries, settings.verifier) if settings.verifier and left else None
    write_results(path, results)
    for number, (source, model) in enumerate(selection, 1):
        if (source, model) in kept:
            continue
        network = recipes[model] if source == RECIPE else None
        task = Task(source, model, settings, verifier, tuple(plugins), network)
        row = measure_in_child(task, limit_seconds)
        rows.pop((source, model), None)
        rows[source, model] = row
        results.teachers = list(rows.values())
        write_results(path, results)
        say(console, f"[{number}/{len(selection)}] {summary(row)}")
    return [row for key, row in rows.items() if key in set(selection)]


def _verifier(registries: Registries, named: str) -> Card:
    """Download the verifier, and return its card."""
    verifier, _ = load_network(verifier_name(named), lambda plugins: registries)
    return admit(verifier, judge=True).card
