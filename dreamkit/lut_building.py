"""Building a latency look-up table ahead of time, and holding it against whole networks."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from dreamkit.errors import DreamkitError
from dreamkit.latency.lut import LookUpTable, grid_below, read_file, read_table
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.prospect import Prospect
from dreamkit.registry import Registries, UnknownEntry
from dreamkit.store.atomic import write_json
from dreamkit.teacher_bench import load_named
from dreamkit.types import LatencyBackend, LayerShape, Teacher, Timing

_AT_ONCE = 24
"""Shapes measured between two writes of the file."""


def shapes_to_measure(
    table: LookUpTable, model: nn.Module, card_size: tuple[int, int, int], least: float
) -> list[LayerShape]:
    """Return the points of a table that serves a network and all that pruning makes of it.

    Args:
        table: knows which layers count on its target.
        model: the network.
        card_size: of its images, (channels, height, width).
        least: share of a layer's channels that pruning leaves at the least.

    Returns:
        For each distinct layer, the points of the grid from ``least`` of its channels to all.
    """
    found: dict[LayerShape, None] = {}
    for shape in table.shapes(model, card_size).values():
        if shape.kind == "norm":
            counts = grid_below(shape.c_out, 1, least)
            found |= {replace(shape, c_in=c, c_out=c): None for c in counts}
            continue
        if shape.depthwise:
            counts = grid_below(shape.c_out, 1, least)
            found |= {replace(shape, c_in=c, c_out=c, groups=c): None for c in counts}
            continue
        inputs = grid_below(shape.c_in, shape.groups, least)
        if shape.c_in == card_size[0]:
            inputs = [shape.c_in]
        outputs = grid_below(shape.c_out, shape.groups, least)
        found |= {replace(shape, c_in=i, c_out=o): None for i in inputs for o in outputs}
    return list(found)


def build_table(
    table: LookUpTable, shapes: Sequence[LayerShape], path: Path, console: Console
) -> int:
    """Measure what a table lacks, writing it every few points; return how many were measured."""
    missing = [shape for shape in shapes if shape not in table.points]
    parts = [missing[i : i + _AT_ONCE] for i in range(0, len(missing), _AT_ONCE)]
    for part in track(parts, "measuring", console=console, disable=not console.is_terminal):
        table.measure(part)
        write_json(path, table.to_json())
    return len(missing)


@dataclass(frozen=True)
class Fit:
    """How well a table tells the latencies of prunings of a network from that of the whole.

    Args:
        predicted: milliseconds of the whole network and of each pruning, as the table has them.
        measured: milliseconds of the same, from end to end.
    """

    predicted: list[float]
    measured: list[float]

    @property
    def scale(self) -> float:
        """How many times longer than its layers the whole network takes."""
        return self.measured[0] / self.predicted[0]

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        scaled = [self.scale * predicted for predicted in self.predicted]
        return list(zip(scaled, self.measured, strict=True))[1:]

    @property
    def r_squared(self) -> float:
        """Share of the prunings' variance that scaled predictions explain."""
        measured = [m for _, m in self._pairs]
        mean = sum(measured) / len(measured)
        total = sum((m - mean) ** 2 for m in measured)
        left = sum((m - p) ** 2 for p, m in self._pairs)
        return 1 - left / total if total else math.nan

    @property
    def mean_error(self) -> float:
        """Mean absolute error of the prunings' predictions, as a share of what was measured."""
        errors = [abs(p - m) / m for p, m in self._pairs]
        return sum(errors) / len(errors)


def check_table(
    table: LookUpTable,
    teacher: Teacher,
    variants: int,
    seed: int,
    console: Console,
) -> Fit:
    """Predict and measure a network and random prunings of it.

    Args:
        table: of the target; what it lacks is measured.
        teacher: the network.
        variants: how many prunings; each removes up to nine tenths of its channels.
        seed: of what is removed.
        console: where progress is shown.
    """
    size = teacher.card.input_size
    models = [teacher.model]
    draws = torch.Generator().manual_seed(seed)
    models += [pruned_at_random(teacher, draws) for _ in range(variants)]
    predicted = []
    example = torch.randn(table.backend.batch_size, *size)
    for model in track(models, "checking", console=console, disable=not console.is_terminal):
        predicted.append(Prospect(table.shapes(model, size)).total(table.predict))
    timings = table.backend.time([(model, example) for model in models])
    measured = [timing.median_ms for timing in timings]
    return Fit(predicted, measured)


def pruned_at_random(teacher: Teacher, draws: torch.Generator) -> nn.Module:
    """Return a copy of a network of which each channel group lost a random share."""
    model = copy.deepcopy(teacher.model)
    graph = ChannelGraph(model, teacher.card.input_size)
    most = float(torch.rand((), generator=draws))
    removed = {}
    for group in graph.groups()[0]:
        share = 0.9 * most * float(torch.rand((), generator=draws))
        gone = torch.randperm(group.channels, generator=draws)[: int(share * group.channels)]
        removed[group.name] = gone.tolist()
    graph.remove(removed)
    return model


# --- the commands -------------------------------------------------------------------------------


def build_for(
    registries: Registries,
    teacher: str,
    path: Path,
    backend: str,
    batch_size: int,
    threads: int | None,
    least: float,
    console: Console,
) -> None:
    """Build the table of a network that ``SOURCE:MODEL`` names.

    Raises:
        DreamkitError: there is no such network or backend, or the file is of another target.
    """
    found = load_named(registries, "TEACHER", teacher, "null")
    target = _backend(registries, backend, {"batch_size": batch_size, "threads": threads})
    table = LookUpTable(target)
    if path.is_file():
        table = read_table(path, target, strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"{path.parent} cannot be made: {error.strerror}") from error
    shapes = shapes_to_measure(table, found.model, found.card.input_size, least)
    number = build_table(table, shapes, path, console)
    kept = f", {len(shapes) - number} were there" if number < len(shapes) else ""
    _say(console, f"{path}: {number} layers measured{kept}")


def _backend(registries: Registries, name: str, options: Mapping[str, Any]) -> LatencyBackend:
    try:
        cls = registries["latency_backends"].resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    known = inspect.signature(cls).parameters
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise DreamkitError(f"the latency backend {name} has no option '{key}'")
    backend: LatencyBackend = cls(**given)
    return backend


def show_table(path: Path, console: Console) -> None:
    """Print a table: a line for each kind of layer.

    Raises:
        DreamkitError: it cannot be read.
    """
    target, points = read_file(path)
    _say(console, ", ".join(f"{key}: {value}" for key, value in target.items()))
    kinds: dict[str, list[tuple[LayerShape, Timing]]] = {}
    for shape, timing in points.items():
        kinds.setdefault(_kind(shape), []).append((shape, timing))
    table = Table("layer", "points", "channels", "ms", "middle half, ms")
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
    registries: Registries, teacher: str, path: Path, variants: int, seed: int, console: Console
) -> None:
    """Hold a table against the network that ``SOURCE:MODEL`` names, and print how well it fits.

    Raises:
        DreamkitError: there is no such network, or the table is of another target.
    """
    found = load_named(registries, "--teacher", teacher, "null")
    target, _ = read_file(path)
    options: dict[str, Any] = {"batch_size": int(target["batch_size"])}
    if target["threads"].isdigit():
        options["threads"] = int(target["threads"])
    runtime = target["runtime"].partition(" ")[0]
    name = (
        runtime if runtime != "torch" else ("torch-cpu" if "threads" in options else "torch-cuda")
    )
    table = read_table(path, _backend(registries, name, options), strict=True)
    before = len(table.points)
    fit = check_table(table, found, variants, seed, console)
    rows = Table("network", "predicted, ms", "measured, ms", "error")
    for number, (predicted, measured) in enumerate(zip(fit.predicted, fit.measured, strict=True)):
        scaled = fit.scale * predicted
        name = "whole" if number == 0 else f"pruned {number}"
        rows.add_row(name, f"{scaled:.3f}", f"{measured:.3f}", f"{scaled / measured - 1:+.1%}")
    console.print(rows)
    _say(
        console,
        f"R² {fit.r_squared:.4f}, mean error {fit.mean_error:.1%}, a network takes "
        f"{fit.scale:.3f} times its layers; {len(table.points) - before} layers were not in the "
        "table and measured now",
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
