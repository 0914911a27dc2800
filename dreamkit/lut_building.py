"""Building a latency look-up table ahead of time, and holding it against whole networks."""

from __future__ import annotations

import copy
import inspect
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dreamkit.errors import DreamkitError
from dreamkit.latency.lut import AT_ONCE, LookUpTable, grid_below, read_file, read_table
from dreamkit.pruning.cost_model import CostModel
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.registry import Registries, UnknownEntry
from dreamkit.store.atomic import write_atomically
from dreamkit.teacher_bench import load_named
from dreamkit.types import LatencyBackend, LayerShape, Teacher, Timing

_MOST = 0.9
"""Share of a group's channels that networks lose at the most that a table is held against."""
_KNOWN = 16
"""Networks from which is told what more than its layers one takes."""
_RUNS = 3
"""Times that networks are timed at the least: a sample may be a tenth off."""
_SURE = 5e-3
"""They are timed until their means are as sure on average: standard error, a share of them."""


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
            counts = grid_below(shape.c_out, 1, 1, least)
            found |= {replace(shape, c_in=c, c_out=c): None for c in counts}
            continue
        if shape.depthwise:
            counts = grid_below(shape.c_out, 1, table.block, least)
            found |= {replace(shape, c_in=c, c_out=c, groups=c): None for c in counts}
            continue
        block = table.block if shape.kind == "conv" else 1
        inputs = grid_below(shape.c_in, shape.groups, block, least)
        if shape.c_in == card_size[0]:
            inputs = [shape.c_in]
        outputs = grid_below(shape.c_out, shape.groups, block, least)
        found |= {replace(shape, c_in=i, c_out=o): None for i in inputs for o in outputs}
    return list(found)


def build_table(
    table: LookUpTable, shapes: Sequence[LayerShape], path: Path, console: Console
) -> int:
    """Measure what a table lacks, writing it after every run; return how many were measured."""
    missing = [shape for shape in shapes if shape not in table.points]
    # A stretch of time in which the machine is slower then has some of every layer.
    random.Random(0).shuffle(missing)
    parts = [missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)]
    for part in track(parts, "measuring", console=console, disable=not console.is_terminal):
        table.measure(part)
        write_atomically(path, table.to_text().encode())
    return len(missing)


@dataclass(frozen=True)
class Fit:
    """How well a table tells the latencies of prunings of a network.

    A network takes longer than its layers do one by one, and some of that is the same however
    narrow they are (what calls them; additions). Both are told, as a line of least squares, from
    the first networks, and the others are held against it.

    Args:
        layers: milliseconds of all layers of each network, as the table has them.
        measured: milliseconds of the same networks, from end to end.
        known: how many of them the line is told from.
    """

    layers: list[float]
    measured: list[float]
    known: int

    @property
    def scale(self) -> float:
        """How much longer a network takes where its layers take a millisecond longer."""
        return self._line()[0]

    @property
    def constant(self) -> float:
        """Milliseconds that a network takes however narrow its layers are."""
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        scale, constant = statistics.linear_regression(
            self.layers[: self.known], self.measured[: self.known]
        )
        return scale, constant

    @property
    def predicted(self) -> list[float]:
        """Milliseconds of every network as its layers tell them."""
        scale, constant = self._line()
        return [constant + scale * layers for layers in self.layers]

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.predicted, self.measured, strict=True))[self.known :]

    @property
    def r_squared(self) -> float:
        """Share of the variance of what was measured that predictions explain."""
        measured = [m for _, m in self._pairs]
        mean = sum(measured) / len(measured)
        total = sum((m - mean) ** 2 for m in measured)
        left = sum((m - p) ** 2 for p, m in self._pairs)
        return 1 - left / total if total else math.nan

    @property
    def mean_error(self) -> float:
        """Mean absolute error of predictions, as a share of what was measured."""
        errors = [abs(p - m) / m for p, m in self._pairs]
        return sum(errors) / len(errors)


def check_table(
    table: LookUpTable,
    teacher: Teacher,
    variants: int,
    seed: int,
    seconds: float,
    console: Console,
) -> Fit:
    """Predict and measure prunings of a network at random.

    Args:
        table: of the target; what it lacks is measured.
        teacher: the network.
        variants: how many prunings, from none to nine tenths of the channels.
        seed: of what is removed.
        seconds: after as long they are not timed once more, however unsure their means are.
        console: where progress is shown.

    Returns:
        The fit, told from the whole network, its narrowest pruning and some at random.

    Raises:
        DreamkitError: nothing of the network can be pruned.
    """
    size = teacher.card.input_size
    graph = ChannelGraph(copy.deepcopy(teacher.model), size)
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
    layers = []
    for model in track(models, "checking", console=console, disable=not console.is_terminal):
        shapes = table.shapes(model, size)
        table.prepare(shapes.values())
        layers.append(CostModel(shapes).total(table.predict))
    example = torch.randn(table.backend.batch_size, *size)
    measured = _time_often(table.backend, [(model, example) for model in models], seconds, console)
    # The line is told from networks among the others: their place in turn and in memory may tell.
    order = [0, 1, *(2 + torch.randperm(len(models) - 2, generator=draws)).tolist()]
    return Fit([layers[i] for i in order], [measured[i] for i in order], _KNOWN)


def _time_often(
    backend: LatencyBackend,
    modules: Sequence[tuple[nn.Module, Tensor]],
    seconds: float,
    console: Console,
) -> list[float]:
    """Return the mean over several times of each module's median, in milliseconds.

    Of a machine that has a faster and a slower state, the median of all tells which of them a
    module saw a little more of; the mean, how much of each.
    """
    start = time.perf_counter()
    runs: list[list[float]] = []
    with console.status("timing"):
        while len(runs) < _RUNS or (_doubt(runs) > _SURE and time.perf_counter() - start < seconds):
            runs.append([timing.median_ms for timing in backend.time(modules)])
    return [statistics.fmean(medians) for medians in zip(*runs, strict=True)]


def _doubt(runs: Sequence[Sequence[float]]) -> float:
    """Return the standard error of modules' means over runs, a share of them, on average."""
    errors = [
        statistics.stdev(medians) / math.sqrt(len(medians)) / statistics.fmean(medians)
        for medians in zip(*runs, strict=True)
    ]
    return statistics.fmean(errors)


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


# --- the commands -------------------------------------------------------------------------------


def build_for(
    registries: Registries,
    teacher: str,
    path: Path,
    backend: str,
    batch_size: int | None,
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
    # As a network has them, from the largest maps to the smallest; linear layers have none.
    ordered = sorted(points.items(), key=lambda pair: -math.prod(pair[0].feature_map or (0,)))
    for shape, timing in ordered:
        kinds.setdefault(_kind(shape), []).append((shape, timing))
    table = Table("layer", "points", "channels: fastest … slowest", "ms", "interquartile range, ms")
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
    teacher: str,
    path: Path,
    variants: int,
    seed: int,
    seconds: float,
    console: Console,
) -> None:
    """Hold a table against the network that ``SOURCE:MODEL`` names, and print how well it fits.

    Raises:
        DreamkitError: there is no such network, or the table is of another target.
    """
    found = load_named(registries, "--teacher", teacher, "null")
    target, _ = read_file(path)
    backend, refused = _measured_by(registries, target)
    try:
        table = read_table(path, backend, strict=True)
    except DreamkitError as other:
        unasked = f" (not asked: {'; '.join(refused)})" if refused else ""
        raise DreamkitError(f"{other}{unasked}") from other
    before = len(table.points)
    fit = check_table(table, found, variants, seed, seconds, console)
    rows = Table("network", "predicted, ms", "measured, ms", "error")
    for number, (predicted, measured) in enumerate(zip(fit.predicted, fit.measured, strict=True)):
        if number >= fit.known:
            error = f"{predicted / measured - 1:+.1%}"
            name = f"pruned {number + 1 - fit.known}"
            rows.add_row(name, f"{predicted:.3f}", f"{measured:.3f}", error)
    console.print(rows)
    _say(
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
    options = {
        name: int(target[name])
        for name in ("batch_size", "threads")
        if target.get(name, "").isdecimal()
    }
    found: list[tuple[int, LatencyBackend]] = []
    refused = []
    backends = registries["latency_backends"]
    for name in backends:
        try:
            cls = backends.resolve(name)
            known = inspect.signature(cls).parameters
            backend = cls(**{key: value for key, value in options.items() if key in known})
            here = backend.describe()
        except Exception as error:  # it is anyone's code; its device or package may not be there
            refused.append(f"{name}: {error}")
            continue
        same = target.items() & here.items()
        found.append((len(same) - len(target.keys() | here.keys()), backend))
    if not found:
        raise DreamkitError(f"no latency backend can be used here: {'; '.join(refused)}")
    return max(found, key=lambda pair: pair[0])[1], refused


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
