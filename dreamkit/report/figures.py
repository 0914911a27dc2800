"""Pictures of a run: the grid of dreams and the curves of its stages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

_GRID_ROWS = 8
_CELL_PIXELS = 64
_GAP = 6
_GAP_GREY = 128


def grid(images: Tensor, labels: Tensor, columns: int = 10) -> Image.Image:
    """Arrange stored images in a grid, a class a column as far as there are columns.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,).
        columns: classes shown, those that come first.

    Returns:
        The picture; small images are enlarged without smoothing.
    """
    classes = sorted(set(labels.tolist()))[:columns]
    rows = min(_GRID_ROWS, max(int((labels == label).sum()) for label in classes))
    channels, height, width = images.shape[1:]
    scale = max(1, _CELL_PIXELS // max(height, width))
    cell_height, cell_width = height * scale + _GAP, width * scale + _GAP
    sheet = torch.full(
        (channels, rows * cell_height + _GAP, len(classes) * cell_width + _GAP), _GAP_GREY
    )
    for column, label in enumerate(classes):
        for row, image in enumerate(images[labels == label][:rows]):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            top, left = row * cell_height + _GAP, column * cell_width + _GAP
            sheet[:, top : top + height * scale, left : left + width * scale] = large
    pixels = sheet.to(torch.uint8)
    array = pixels[0] if channels == 1 else pixels[:3].permute(1, 2, 0)
    return Image.fromarray(array.numpy())


def curves(stage: str, records: Sequence[dict[str, Any]]) -> str:
    """Draw every number of a stage over its steps, one panel each.

    Returns:
        An SVG element.
    """
    names = list(dict.fromkeys(name for record in records for name in record if name != "step"))
    across = min(3, len(names))
    down = -(-len(names) // across)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": stage}):
        figure = Figure(figsize=(3.4 * across, 2.2 * down), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(down, across, number + 1)
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1)
            axes.set_title(name)
            axes.grid(alpha=0.3)
            values = [value for _, value in points]
            if values and min(values) > 0 and max(values) > 50 * min(values):
                axes.set_yscale("log")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
