"""Pictures: the grid of a run's dreams, the curves of its stages, points of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_GRID_ROWS = 8
_GRID_COLUMNS = 10
_CELL_PIXELS = 64
_GAP = 6
_GAP_GREY = 128
_NAMED_POINTS = 40
_NAMED_CLASSES = 20


def grid(images: Tensor, labels: Tensor) -> Image.Image:
    """Arrange stored images in a grid: a class a column if there are at most ten, else in order.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,).

    Returns:
        The picture; small images are enlarged without smoothing.
    """
    classes = sorted(set(labels.tolist()))
    if len(classes) <= _GRID_COLUMNS:
        columns = [images[labels == label][:_GRID_ROWS] for label in classes]
    else:
        shown = images[: _GRID_ROWS * _GRID_COLUMNS]
        columns = [shown[column::_GRID_COLUMNS] for column in range(_GRID_COLUMNS)]
    rows = max(len(column) for column in columns)
    channels, height, width = images.shape[1:]
    scale = max(1, _CELL_PIXELS // max(height, width))
    cell_height, cell_width = height * scale + _GAP, width * scale + _GAP
    size = (rows * cell_height + _GAP, len(columns) * cell_width + _GAP)
    sheet = torch.full((channels, *size), _GAP_GREY, dtype=torch.uint8)
    for number, column in enumerate(columns):
        for row, image in enumerate(column):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            top, left = row * cell_height + _GAP, number * cell_width + _GAP
            sheet[:, top : top + height * scale, left : left + width * scale] = large
    array = sheet[0] if channels == 1 else sheet[:3].permute(1, 2, 0)
    return Image.fromarray(array.numpy())


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Shrink stored images (N, C, H, W) until neither side is longer than ``side`` pixels."""
    longest = max(images.shape[2:])
    if longest <= side:
        return images
    size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    return F.interpolate(images.float(), size=size, mode="area").round().to(torch.uint8)


def as_png(picture: Image.Image) -> bytes:
    """Return what a PNG file of a picture holds."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def curves(stage: str, records: Mapping[int, Mapping[str, float | None]]) -> str:
    """Draw every number of a stage over its steps, one panel each.

    Returns:
        An SVG element.
    """
    names = list(dict.fromkeys(name for numbers in records.values() for name in numbers))
    across = max(1, min(3, len(names)))
    down = -(-len(names) // across)
    with _style(stage):
        figure = Figure(figsize=(3.4 * across, 2.2 * down), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(down, across, number + 1)
            shown = {step: numbers.get(name) for step, numbers in records.items()}
            points = {step: value for step, value in shown.items() if value is not None}
            axes.plot(list(points), list(points.values()), linewidth=1)
            axes.set_title(name)
            axes.grid(alpha=0.3)
            if _is_wide(list(points.values())):
                axes.set_yscale("log")
        return _svg(figure)


def scatter(
    points: Mapping[str, Mapping[str, tuple[float, float]]], x_title: str, y_title: str
) -> str:
    """Draw points of several groups, one colour each; a few are named, many are not.

    Args:
        points: by group and name, (x, y).
        x_title: of the horizontal axis.
        y_title: of the vertical axis.

    Returns:
        An SVG element. An axis whose values span a wide range is logarithmic.
    """
    pairs = [pair for named in points.values() for pair in named.values()]
    with _style(x_title + y_title):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for group, named in points.items():
            xs, ys = zip(*named.values(), strict=True)
            axes.scatter(xs, ys, s=14, label=group)
            for name, pair in named.items() if len(pairs) <= _NAMED_POINTS else ():
                axes.annotate(name, pair, (3, 3), textcoords="offset points", fontsize=6)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.grid(alpha=0.3)
        axes.legend()
        if _is_wide([x for x, _ in pairs]):
            axes.set_xscale("log")
        if _is_wide([y for _, y in pairs]):
            axes.set_yscale("log")
        return _svg(figure)


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Draw a confusion matrix: each row's shares, from none (white) to all (dark).

    Args:
        counts: a row for each true class, a column for each predicted one.
        names: of the classes.

    Returns:
        An SVG element. Classes are named, and shares written out, where there is room.
    """
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = min(9.0, 2.0 + 0.35 * len(names))
    with _style("confusion"):
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(names) <= _NAMED_CLASSES:
            places = range(len(names))
            axes.set_xticks(places, names, rotation=90)
            axes.set_yticks(places, names)
            for row in places:
                for column in places:
                    dark = "white" if shares[row][column] > 0.5 else "black"
                    share = f"{shares[row][column]:.2f}".removeprefix("0")
                    axes.text(column, row, share, ha="center", va="center", color=dark, fontsize=6)
        return _svg(figure)


def sensitivity(shares: Sequence[float], agreement: Mapping[str, Sequence[float]]) -> str:
    """Draw how much agreement is left of a network that lacks a part of one group, a row each.

    Args:
        shares: of a group's channels that were removed.
        agreement: by group, along the shares, in [0, 1].

    Returns:
        An SVG element, from nothing left (white) to all (dark).
    """
    with _style("sensitivity"):
        size = (2.5 + 0.7 * len(shares), 0.8 + 0.2 * len(agreement))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(list(agreement.values()), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xlabel("share of the channels removed")
        axes.set_xticks(range(len(shares)), [f"{100 * share:.3g} %" for share in shares])
        axes.set_yticks(range(len(agreement)), list(agreement), fontsize=6)
        return _svg(figure)


def _style(salt: str) -> AbstractContextManager[None]:
    """Set what all figures share; the salt makes the identifiers in an SVG the same every time."""
    return matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": salt})


def _is_wide(values: Sequence[float]) -> bool:
    """Return whether values are better seen on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) > 50 * min(values)


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
