"""Latency look-up tables: each distinct layer measured on the target, and interpolated.

LAT of a model is the sum over its convolutions and linear layers (hardware-aware pruning,
DeepInversion eq. 10; HALP, Shen et al. 2022), and over BatchNorm with its activation where the
target computes them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.errors import DreamkitError
from dreamkit.model_state import device_of, eval_mode, hooked
from dreamkit.types import LatencyBackend, LayerShape, Timing

FORMAT = 2
_ACTIVATIONS = {
    *("ReLU", "ReLU6", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Hardsigmoid", "Sigmoid", "Mish"),
    *("ELU", "Tanh"),
}


class LookUpTable:
    """Measured latencies of layers by shape; what is missing is measured when asked for.

    Channel counts lie on a grid of a quarter octave (..., 64, 80, 96, 112, 128, 160, ...);
    between its points the latency is interpolated linearly in both counts.

    Args:
        backend: how to measure.
        points: measured before, on the same target.
    """

    def __init__(
        self, backend: LatencyBackend, points: dict[LayerShape, Timing] | None = None
    ) -> None:
        self.backend = backend
        self.points = dict(points or {})

    def predict(self, shape: LayerShape) -> float:
        """Return one layer's latency in milliseconds."""
        corners = _corners(shape)
        self.measure(corner for corner, _ in corners)
        return sum(share * self.points[corner].median_ms for corner, share in corners)

    def measure(self, shapes: Iterable[LayerShape]) -> None:
        """Measure those shapes that are not in the table, in turn within one run."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.points]
        if missing:
            built = [build_layer(shape, self.backend.batch_size) for shape in missing]
            self.points |= dict(zip(missing, self.backend.time(built), strict=True))

    def shapes(self, model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
        """Return the shape of every layer that counts on the target, by name, in forward order."""
        shapes = layer_shapes(model, input_size)
        if not getattr(self.backend, "folds_norms", False):
            return shapes
        return {name: shape for name, shape in shapes.items() if shape.kind != "norm"}

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON-safe data, with what its figures hold for."""
        rows = [{**asdict(shape), **asdict(timing)} for shape, timing in self.points.items()]
        return {"format": FORMAT, "target": self.backend.describe(), "points": rows}


def read_table(path: Path, backend: LatencyBackend, strict: bool = False) -> LookUpTable:
    """Read a table.

    Args:
        path: its file.
        backend: the target it must have been measured on.
        strict: refuse a file that does not serve. Else a table is a cache: one that is absent,
            damaged or of another target is an empty one.

    Raises:
        DreamkitError: the file does not serve, and ``strict`` is set.
    """
    here = backend.describe()
    try:
        target, points = read_file(path)
    except DreamkitError:
        if strict:
            raise
        return LookUpTable(backend)
    if target == here:
        return LookUpTable(backend, points)
    if strict:
        keys = sorted(target.keys() | here.keys())
        other = [
            f"{key} {target.get(key)} there, {here.get(key)} here"
            for key in keys
            if target.get(key) != here.get(key)
        ]
        raise DreamkitError(
            f"{path} was measured on another target ({'; '.join(other)}): measure it here with "
            "'dreamkit lut build'"
        )
    return LookUpTable(backend)


def read_file(path: Path) -> tuple[dict[str, str], dict[LayerShape, Timing]]:
    """Return what a table was measured on, as a backend describes it, and its points.

    Raises:
        DreamkitError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        target = {str(key): str(value) for key, value in data["target"].items()}
        points = {}
        for row in data["points"]:
            timing = Timing(row.pop("median_ms"), row.pop("spread_ms"))
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
            }
            points[LayerShape(**fields)] = timing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DreamkitError(f"{path} cannot be read as a latency table: {error}") from error
    return target, points


def layer_shapes(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
    """Return the shape of every layer that a forward pass calls, in its order.

    Layers are convolutions, linear ones, and BatchNorm of feature maps with the activation module
    that is called next.
    """
    found: dict[str, LayerShape] = {}
    norms: list[str] = []

    def see(name: str, module: nn.Module, x: Tensor) -> None:
        norm = norms.pop() if norms else None
        if isinstance(module, nn.Conv2d):
            found[name] = LayerShape(
                kind="conv",
                c_in=module.in_channels,
                c_out=module.out_channels,
                kernel=tuple(module.kernel_size),
                stride=tuple(module.stride),
                padding=_padding(module),
                dilation=tuple(module.dilation),
                groups=module.groups,
                bias=module.bias is not None,
                feature_map=tuple(x.shape[2:]),
            )
        elif isinstance(module, nn.Linear):
            bias = module.bias is not None
            found[name] = LayerShape("linear", module.in_features, module.out_features, bias=bias)
        elif isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            size = x.shape[1]
            own = type(getattr(module, "act", None)).__name__  # timm's BatchNormAct2d
            activation = own if own in _ACTIVATIONS else ""
            found[name] = LayerShape(
                "norm", size, size, feature_map=tuple(x.shape[2:]), activation=activation
            )
            if not activation:
                norms.append(name)
        elif norm is not None and type(module).__name__ in _ACTIVATIONS:
            found[norm] = replace(found[norm], activation=type(module).__name__)

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children()) or isinstance(module, nn.BatchNorm2d)
    ]
    example = torch.zeros(1, *input_size, device=device_of(model))
    with torch.no_grad(), eval_mode(model), hooked(leaves, see):
        model(example)
    return found


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return a convolution's padding in pixels, also where it is given as a word."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0, 0)
    pairs = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in pairs)


def build_layer(shape: LayerShape, batch_size: int) -> tuple[nn.Module, Tensor]:
    """Return a layer of this shape and an input for it."""
    if shape.kind == "norm":
        parts: list[nn.Module] = [nn.BatchNorm2d(shape.c_out)]
        if shape.activation:
            parts.append(getattr(nn, shape.activation)())
        return nn.Sequential(*parts).eval(), torch.randn(
            batch_size, shape.c_out, *shape.feature_map
        )
    if shape.kind == "linear":
        layer: nn.Module = nn.Linear(shape.c_in, shape.c_out, bias=shape.bias)
        return layer.eval(), torch.randn(batch_size, shape.c_in)
    height, width = shape.feature_map
    layer = nn.Conv2d(
        shape.c_in,
        shape.c_out,
        (shape.kernel[0], shape.kernel[1]),
        (shape.stride[0], shape.stride[1]),
        (shape.padding[0], shape.padding[1]),
        (shape.dilation[0], shape.dilation[1]),
        shape.groups,
        shape.bias,
    )
    return layer.eval(), torch.randn(batch_size, shape.c_in, height, width)


def _grid(channels: int, multiple: int) -> list[tuple[int, float]]:
    """Return the grid points around a channel count with their shares; one point if it is on it."""
    units = channels / multiple
    octave = 2 ** math.floor(math.log2(units)) if units >= 1 else 1
    step = max(octave // 4, 1)
    low = int(units // step) * step
    share = (units - low) / step
    points = [(low * multiple, 1 - share), ((low + step) * multiple, share)]
    return [(point, part) for point, part in points if part > 0]


def grid_below(channels: int, multiple: int, least: float) -> list[int]:
    """Return the grid points that serve every count from a share of some channels to all of them.

    Args:
        channels: all of them.
        multiple: the layer's groups; counts are multiples of it.
        least: the share, in (0, 1].
    """
    lowest = max(multiple, math.ceil(least * channels / multiple) * multiple)
    counts = range(lowest, channels + 1, multiple)
    return sorted({point for count in counts for point, _ in _grid(count, multiple)})


def _corners(shape: LayerShape) -> list[tuple[LayerShape, float]]:
    """Return the grid shapes around a shape, and the share of each in its latency."""
    if shape.kind == "norm":
        return [(replace(shape, c_in=c, c_out=c), share) for c, share in _grid(shape.c_out, 1)]
    if shape.depthwise:
        return [
            (replace(shape, c_in=c, c_out=c, groups=c), share) for c, share in _grid(shape.c_out, 1)
        ]
    return [
        (replace(shape, c_in=c_in, c_out=c_out), share_in * share_out)
        for c_in, share_in in _grid(shape.c_in, shape.groups)
        for c_out, share_out in _grid(shape.c_out, shape.groups)
    ]
