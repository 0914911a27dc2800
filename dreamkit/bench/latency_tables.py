"""Building a latency look-up table ahead of time, and holding it against whole networks."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.latency.fit import Fit
from dreamkit.latency.grid import shapes_to_measure
from dreamkit.latency.sampling import mean_times
from dreamkit.latency.table import AT_ONCE, LookUpTable
from dreamkit.latency.table_file import read_file, read_table, table_text
from dreamkit.plugins import added_rules
from dreamkit.pruning.cost_model import CostModel
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.recipe.options import build_entry
from dreamkit.registry import Registries, UnknownEntry
from dreamkit.report.run_log import ConsoleLog
from dreamkit.store.atomic import write_atomically
from dreamkit.types import ChannelRule, LatencyBackend, LayerShape, Teacher, Timing
from dreamkit.wording import say

_MOST = 0.9
"""Share of a group's channels that networks lose at the most that a table is held against."""
_KNOWN = 16
"""Networks from which is told what more than its layers one takes."""


def build_table(
    table: LookUpTable, shapes: Sequence[LayerShape], path: Path, console: Console
) -> int:
    """Measure what a table lacks, writing it after every run; return how many were measured."""
    missing = [shape for shape in shapes if shape not in table.points]
    # A stretch of time in which the machine is slower then has some of every layer.
    random.Random(0).shuffle(missing)
    parts = [missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)]
    with ConsoleLog(console).progress("measuring layers", len(missing)) as advance:
        for number, part in enumerate(parts, 1):
            table.measure(part)
            write_atomically(path, table_text(table).encode())
            advance(min(number * AT_ONCE, len(missing)))
    return len(missing)


def check_table(
    table: LookUpTable,
    teacher: Teacher,
    variants: int,
    seed: int,
    seconds: float,
    console: Console,
    rules: Sequence[ChannelRule] = (),
) -> Fit:
    """Predict and measure prunings of a network at random.

    Args:
        table: of the target; what it lacks is measured.
        teacher: the network.
        variants: how many prunings, from none to nine tenths of the channels.
        seed: of what is removed.
        seconds: after as long they are not timed once more, however unsure their means are.
        console: where progress is shown.
        rules: how plugins' layers and operations treat channels.

    Returns:
        The fit, told from the whole network, its narrowest pruning and some at random.

    Raises:
        DreamkitError: nothing of the network can be pruned.
    """
    size = teacher.card.input_size
    graph = ChannelGraph(copied(teacher.model), size, rules=rules)
    if not graph.groups()[0]:
        raise DreamkitError(
            f"nothing of {teacher.card.name} can be pruned, so there is nothing to hold the table "
            "against; 'dreamkit doctor' says why"
        )
    draws = torch.Generator().manual_seed(seed)
    models = [teacher.model, pruned(graph, _MOST, _MOST, draws)]
    while len(models) < _KNOWN + variants:
        most = _MOST * float(torch.rand((), generator=draws))
        models.append(pruned(graph, most / 2, most, draws))
    layers, log = [], ConsoleLog(console)
    with log.progress("measuring layers", len(models)) as advance:
        for number, model in enumerate(models, 1):
            shapes = table.shapes(model, size)
            table.prepare(shapes.values())
            layers.append(CostModel(shapes).total(table.predict))
            advance(number)
    example = torch.randn(table.backend.batch_size, *size)
    with log.progress("timing networks", 1):
        measured = mean_times(table.backend, [(model, example) for model in models], seconds)
    # The line is told from networks among the others: their place in turn and in memory may tell.
    order = [0, 1, *(2 + torch.randperm(len(models) - 2, generator=draws)).tolist()]
    return Fit([layers[i] for i in order], [measured[i] for i in order], _KNOWN)


def pruned(graph: ChannelGraph, least: float, most: float, draws: torch.Generator) -> nn.Module:
    """Return a copy of a graph's network of which each group lost channels at random.

    Args:
        graph: of the network.
        least: share of a group's channels that goes at the least.
        most: at the most.
        draws: say how many, and which.
    """
    graph = copy.deepcopy(graph)
    removed = {}
    for group in graph.groups()[0]:
        share = least + (most - least) * float(torch.rand((), generator=draws))
        number = int(share * group.channels)
        removed[group.name] = torch.randperm(group.channels, generator=draws)[:number].tolist()
    graph.remove(removed)
    return graph.model


def build_for(
    registries: Registries,
    found: Teacher,
    path: Path,
    backend: str,
    options: Mapping[str, Any],
    least: float,
    console: Console,
) -> None:
    """Build the table of a network.

    Args:
        registries: with the backends.
        found: the network.
        path: of the table.
        backend: its name.
        options: of the backend.
        least: share of a layer's channels that prunings leave at the least.
        console: where progress is shown.

    Raises:
        DreamkitError: there is no such backend, it has no such option, or the file is of another
            target.
    """
    target = _backend(registries, backend, options)
    table = LookUpTable(target)
    if path.is_file():
        table = read_table(path, target, strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"{path.parent} cannot be made: {error.strerror}") from error
    size = found.card.input_size
    layers = table.shapes(found.model, size).values()
    shapes = shapes_to_measure(layers, table.block, size[0], least)
    number = build_table(table, shapes, path, console)
    kept = f", {len(shapes) - number} were there" if number < len(shapes) else ""
    say(console, f"{path}: {number} layers measured{kept}")


def _backend(registries: Registries, name: str, options: Mapping[str, Any]) -> LatencyBackend:
    try:
        cls = registries["latency_backends"].resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    known = inspect.signature(cls).parameters
    for key in options:
        if key not in known:
            raise DreamkitError(f"the latency backend {name} has no option '{key}'")
    entry = {"name": name, **options}
    backend: LatencyBackend = build_entry(registries, "latency_backends", entry)
    return backend


def show_table(path: Path, console: Console) -> None:
    """Print a table: a line for each kind of layer.

    Raises:
        DreamkitError: it cannot be read.
    """
    target, points = read_file(path)
    say(console, ", ".join(f"{key}: {value}" for key, value in target.items()))
    kinds: dict[str, list[tuple[LayerShape, Timing]]] = {}
    # As a network has them, from the largest maps to the smallest; linear layers have none.
    ordered = sorted(points.items(), key=lambda pair: -math.prod(pair[0].feature_map or (0,)))
    for shape, timing in ordered:
        kinds.setdefault(_kind(shape), []).append((shape, timing))
    table = Table("layer", "points", "channels: fastest … slowest", "ms", "IQR, ms")
    for kind, measured in kinds.items():
        low, high = (f(measured, key=lambda pair: pair[1].median_ms) for f in (min, max))
        table.add_row(
            kind,
            str(len(measured)),
            f"{_channels(low[0])} … {_channels(high[0])}",
            f"{low[1].median_ms:.4f} … {high[1].median_ms:.4f}",
            f"{low[1].spread_ms:.4f} … {high[1].spread_ms:.4f}",
        )
    console.print(table)


def _kind(shape: LayerShape) -> str:
    if shape.kind == "linear":
        return "linear"
    if shape.kind == "norm":
        size = "x".join(map(str, shape.feature_map))
        return " and ".join(filter(None, ("BatchNorm", shape.activation))) + f" on {size}"
    size, kernel, stride = (
        "x".join(map(str, numbers)) for numbers in (shape.feature_map, shape.kernel, shape.stride)
    )
    groups = "depthwise" if shape.depthwise else f"{shape.groups} groups"
    return f"{kernel} on {size}, stride {stride}" + (f", {groups}" if shape.groups > 1 else "")


def _channels(shape: LayerShape) -> str:
    return (
        str(shape.c_out)
        if shape.depthwise or shape.kind == "norm"
        else f"{shape.c_in}→{shape.c_out}"
    )


def check_for(
    registries: Registries,
    found: Teacher,
    path: Path,
    variants: int,
    seed: int,
    seconds: float,
    console: Console,
) -> None:
    """Hold a table against a network, and print how well it fits.

    Raises:
        DreamkitError: the table is of another target.
    """
    target, _ = read_file(path)
    backend, refused = _measured_by(registries, target)
    try:
        table = read_table(path, backend, strict=True)
    except DreamkitError as other:
        unasked = f" (not asked: {'; '.join(refused)})" if refused else ""
        raise DreamkitError(f"{other}{unasked}") from other
    before = len(table.points)
    rules = added_rules(registries, partial(say, console))
    fit = check_table(table, found, variants, seed, seconds, console, rules)
    rows = Table("network", "predicted, ms", "measured, ms", "error")
    for number, (predicted, measured) in enumerate(zip(fit.predicted, fit.measured, strict=True)):
        if number >= fit.known:
            error = f"{predicted / measured - 1:+.1%}"
            name = f"pruned {number + 1 - fit.known}"
            rows.add_row(name, f"{predicted:.3f}", f"{measured:.3f}", error)
    console.print(rows)
    say(
        console,
        f"R² {fit.r_squared:.4f}, mean error {fit.mean_error:.1%}, a network takes "
        f"{fit.scale:.3f} times its layers and {fit.constant:.3f} ms; "
        f"{len(table.points) - before} layers were not in the table and measured now",
    )


def _measured_by(
    registries: Registries, target: Mapping[str, str]
) -> tuple[LatencyBackend, list[str]]:
    """Return the backend that is nearest to a table's target by what it says of itself.

    And those that cannot be asked, with the reason.
    """
    options: dict[str, Any] = {
        name: int(target[name])
        for name in ("batch_size", "threads")
        if target.get(name, "").isdecimal()
    }
    options |= {"dtype": target["dtype"]} if "dtype" in target else {}
    found: list[tuple[int, LatencyBackend]] = []
    refused = []
    backends = registries["latency_backends"]
    for name in backends:
        try:
            cls = backends.resolve(name)
            known = inspect.signature(cls).parameters
            entry = {"name": name, **{k: value for k, value in options.items() if k in known}}
            backend: LatencyBackend = build_entry(registries, "latency_backends", entry)
            here = backend.describe()
        except Exception as error:  # it is anyone's code; its device or package may not be there
            refused.append(f"{name}: {error}")
            continue
        same = target.items() & here.items()
        found.append((len(same) - len(target.keys() | here.keys()), backend))
    if not found:
        raise DreamkitError(f"no latency backend can be used here: {'; '.join(refused)}")
    return max(found, key=lambda pair: pair[0])[1], refused
