"""Pictures of a run: the grid of dreams and the curves of its stages."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

_GRID_ROWS = 8
_GRID_COLUMNS = 10
_CELL_PIXELS = 64
_GAP = 6
_GAP_GREY = 128


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


def curves(stage: str, records: Mapping[int, Mapping[str, float | None]]) -> str:
    """Draw every number of a stage over its steps, one panel each.

    Returns:
        An SVG element.
    """
    names = list(dict.fromkeys(name for numbers in records.values() for name in numbers))
    across = max(1, min(3, len(names)))
    down = -(-len(names) // across)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": stage}):
        figure = Figure(figsize=(3.4 * across, 2.2 * down), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(down, across, number + 1)
            shown = {step: numbers.get(name) for step, numbers in records.items()}
            points = {step: value for step, value in shown.items() if value is not None}
            axes.plot(list(points), list(points.values()), linewidth=1)
            axes.set_title(name)
            axes.grid(alpha=0.3)
            values = list(points.values())
            if values and min(values) > 0 and max(values) > 50 * min(values):
                axes.set_yscale("log")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
