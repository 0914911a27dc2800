"""Latency look-up tables: each distinct layer measured on the target, and interpolated.

LAT of a model is the sum over its convolutions and linear layers (hardware-aware pruning,
DeepInversion eq. 10; HALP, Shen et al. 2022), and over BatchNorm with its activation where the
target computes them apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from dreamkit.errors import DreamkitError
from dreamkit.latency.grid import corners
from dreamkit.latency.layer_shapes import build_layer, layer_shapes
from dreamkit.types import LatencyBackend, LayerShape, Timing

AT_ONCE = 32
"""Layers measured in one run: all of them, and their inputs, are in memory."""
_AGAIN = 16
"""Layers of a table that are measured again, at the most, where it grows."""


Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Begins a stage with a name and a number of units; the callable takes how many are done."""


def _unseen(stage: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


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

    Attributes:
        progress: shows how many of how many layers are measured, e.g. that of a run's log.
    """

    def __init__(
        self, backend: LatencyBackend, points: dict[LayerShape, Timing] | None = None
    ) -> None:
        self.backend = backend
        self.points = dict(points or {})
        self.progress: Progress = _unseen
        self.asked = False
        """Whether anything wanted a latency to be told."""
        self.block = backend.channel_block
        if type(self.block) is not int or self.block < 1:
            raise DreamkitError(
                f"the latency backend's channel_block should be an integer above 0 (got "
                f"{self.block!r})"
            )

    def predict(self, shape: LayerShape) -> float:
        """Return one layer's latency in milliseconds."""
        self.asked = True
        self.prepare([shape])
        return sum(
            share * self.points[corner].median_ms for corner, share in corners(shape, self.block)
        )

    def prepare(self, shapes: Iterable[LayerShape]) -> None:
        """Measure what predicting these layers asks for, together rather than one by one."""
        different = dict.fromkeys(shapes)
        self.measure(corner for shape in different for corner, _ in corners(shape, self.block))

    def measure(self, shapes: Iterable[LayerShape]) -> None:
        """Measure those shapes that are not in the table, a few dozen in turn within one run.

        A machine is not as fast at all times. Some layers of the table are measured again beside
        the new ones, which are put on its scale.
        """
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.points]
        if not missing:
            return
        with self.progress("measuring layers", len(missing)) as advance:
            for first in range(0, len(missing), AT_ONCE):
                self._measure(missing[first : first + AT_ONCE])
                advance(min(first + AT_ONCE, len(missing)))

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


def _slowdown(ratios: Sequence[float]) -> float:
    """Return how much slower a machine has become, told from layers that were measured again.

    Of a machine that is as fast as it was, some layers seem slower and some faster. Then nothing
    is to be put right: what pruning saves of a layer is less than such an estimate is off.
    """
    if len(ratios) < 4:
        return statistics.median(ratios) if ratios else 1.0
    low, middle, high = statistics.quantiles(ratios, n=4)
    return 1.0 if low <= 1 <= high else middle
