"""Latency look-up tables: each distinct layer measured on the target, and interpolated.

LAT of a model is the sum over its convolutions and linear layers (hardware-aware pruning,
DeepInversion eq. 10; HALP, Shen et al. 2022), and over BatchNorm with its activation where the
target computes them apart.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dreamkit.errors import DreamkitError
from dreamkit.model_state import device_of, eval_mode, hooked
from dreamkit.types import LatencyBackend, LayerShape, Timing

FORMAT = 3
_SHAPES = TypeAdapter(LayerShape)
AT_ONCE = 32
"""Layers measured in one run: all of them, and their inputs, are in memory."""
_AGAIN = 16
"""Layers of a table that are measured again, at the most, where it grows."""
_ACTIVATIONS = {
    *("ReLU", "ReLU6", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Hardsigmoid", "Sigmoid", "Mish"),
    *("ELU", "Tanh"),
}


class LookUpTable:
    """Measured latencies of layers by shape; what is missing is measured when asked for.

    Between measured counts of channels the latency is interpolated linearly in both counts. They
    are half an octave apart (..., 64, 96, 128, ...). Where the target computes channels in blocks
    (``channel_block``), a layer whose channels do not fill them is slower, and takes about
    as long for any rest: counts between two blocks are a class of their own, measured at
    its middle.

    Args:
        backend: how to measure.
        points: measured before, on the same target.
    """

    def __init__(
        self, backend: LatencyBackend, points: dict[LayerShape, Timing] | None = None
    ) -> None:
        self.backend = backend
        self.points = dict(points or {})
        self.block = backend.channel_block
        if type(self.block) is not int or self.block < 1:
            raise DreamkitError(
                f"the latency backend's channel_block should be an integer above 0 (got "
                f"{self.block!r})"
            )

    def predict(self, shape: LayerShape) -> float:
        """Return one layer's latency in milliseconds."""
        corners = _corners(shape, self.block)
        self.prepare([shape])
        return sum(share * self.points[corner].median_ms for corner, share in corners)

    def prepare(self, shapes: Iterable[LayerShape]) -> None:
        """Measure what predicting these layers asks for, together rather than one by one."""
        different = dict.fromkeys(shapes)
        self.measure(corner for shape in different for corner, _ in _corners(shape, self.block))

    def measure(self, shapes: Iterable[LayerShape]) -> None:
        """Measure those shapes that are not in the table, a few dozen in turn within one run.

        A machine is not as fast at all times. Some layers of the table are measured again beside
        the new ones, which are put on its scale.
        """
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.points]
        for first in range(0, len(missing), AT_ONCE):
            self._measure(missing[first : first + AT_ONCE])

    def _measure(self, missing: Sequence[LayerShape]) -> None:
        known = list(self.points)[:: max(1, len(self.points) // _AGAIN)][:_AGAIN]
        built = [build_layer(shape, self.backend.batch_size) for shape in [*known, *missing]]
        timings = self.backend.time(built)
        new = timings[len(known) :]
        pairs = zip(known, timings[: len(known)], strict=True)
        slower = [timing.median_ms / self.points[shape].median_ms for shape, timing in pairs]
        scale = 1 / _slowdown(slower)
        self.points |= {
            shape: Timing(scale * timing.median_ms, scale * timing.spread_ms)
            for shape, timing in zip(missing, new, strict=True)
        }

    def shapes(self, model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
        """Return the shape of every layer that counts on the target, by name, in forward order."""
        shapes = layer_shapes(model, input_size)
        if not self.backend.folds_norms:
            return shapes
        return {name: shape for name, shape in shapes.items() if shape.kind != "norm"}

    def to_text(self) -> str:
        """Return the table as JSON, with what its figures hold for.

        Points stand one a line and in an order of their own, so that two tables can be compared.
        """
        facts = {"format": FORMAT, "target": self.backend.describe()}
        head = json.dumps(facts, indent=1).removesuffix("\n}")
        points = sorted(self.points.items(), key=lambda pair: _place(pair[0]))
        rows = [json.dumps({**asdict(shape), **asdict(timing)}) for shape, timing in points]
        lines = ",\n".join(f"  {row}" for row in rows)
        return f'{head},\n "points": [\n{lines}\n ]\n}}\n'


def _place(shape: LayerShape) -> tuple[Any, ...]:
    """Return what tables are sorted by: points of one layer lie together."""
    facts = asdict(shape)
    counts = [facts.pop(name) for name in ("groups", "c_in", "c_out")]
    return (*facts.values(), *counts)


def _slowdown(ratios: Sequence[float]) -> float:
    """Return how much slower a machine has become, told from layers that were measured again.

    Of a machine that is as fast as it was, some layers seem slower and some faster. Then nothing
    is to be put right: what pruning saves of a layer is less than such an estimate is off.
    """
    if len(ratios) < 4:
        return statistics.median(ratios) if ratios else 1.0
    low, middle, high = statistics.quantiles(ratios, n=4)
    return 1.0 if low <= 1 <= high else middle


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


def layer_shapes(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
    """Return the shape of every layer that a forward pass calls, in its order.

    Layers are convolutions, linear ones, and BatchNorm of feature maps with the activation module
    that is called next.
    """
    from torchvision.ops import FrozenBatchNorm2d  # a second, and half of the runs need it not

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


def _half_octave(number: int) -> int:
    """Return how far apart the points 1, 2, 3, 4, 6, 8, 12, ... are from a number on."""
    return max(1 << math.floor(math.log2(number)) >> 1, 1)


def _half_octaves(number: int) -> list[tuple[int, float]]:
    """Return the points 1, 2, 3, 4, 6, 8, 12, ... around a number, and the share of each in it."""
    step = _half_octave(number)
    low = number // step * step
    share = (number - low) / step
    return [(low, 1 - share), (low + step, share)] if share else [(low, 1.0)]


def _grid(channels: int, multiple: int, block: int) -> list[tuple[int, float]]:
    """Return the measured channel counts around one, and the share of each in its latency.

    Args:
        channels: the count.
        multiple: the layer's groups; counts are multiples of it.
        block: channels that the target computes together.
    """
    if multiple > 1:
        return [(point * multiple, share) for point, share in _half_octaves(channels // multiple)]
    blocks, rest = divmod(channels, block)
    if not rest:
        return [(point * block, share) for point, share in _half_octaves(blocks)]
    if not blocks:
        low = _half_octaves(channels)[0][0]
        high = min(low + _half_octave(low), block - 1)  # a whole block is of the other class
        share = (channels - low) / (high - low) if high > low else 0.0
        return [(point, part) for point, part in ((low, 1 - share), (high, share)) if part]
    # An odd rest: half a block is a whole one to some kernels.
    middle = max(block // 2 - 1, 1)
    return [(point * block + middle, share) for point, share in _half_octaves(blocks)]


def grid_below(channels: int, multiple: int, block: int, least: float) -> list[int]:
    """Return the grid points that serve every count from a share of some channels to all of them.

    Args:
        channels: all of them.
        multiple: the layer's groups; counts are multiples of it.
        block: channels that the target computes together.
        least: the share, in (0, 1].
    """
    lowest = max(multiple, math.ceil(least * channels / multiple) * multiple)
    counts = range(lowest, channels + 1, multiple)
    return sorted({point for count in counts for point, _ in _grid(count, multiple, block)})


def _corners(shape: LayerShape, block: int) -> list[tuple[LayerShape, float]]:
    """Return the grid shapes around a shape, and the share of each in its latency."""
    if shape.kind == "norm":
        return [(replace(shape, c_in=c, c_out=c), share) for c, share in _grid(shape.c_out, 1, 1)]
    if shape.depthwise:
        return [
            (replace(shape, c_in=c, c_out=c, groups=c), share)
            for c, share in _grid(shape.c_out, 1, block)
        ]
    block = block if shape.kind == "conv" else 1
    return [
        (replace(shape, c_in=c_in, c_out=c_out), share_in * share_out)
        for c_in, share_in in _grid(shape.c_in, shape.groups, block)
        for c_out, share_out in _grid(shape.c_out, shape.groups, block)
    ]
