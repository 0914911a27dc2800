"""Ranges of activations: what they are cut to before they become integers.

Both ways see the images batch by batch and keep a few numbers for each tensor, however many images
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError
from dreamkit.wording import and_more

BINS = 2048
"""Of a tensor's histogram: eight for each of the 256 integers."""
LEVELS = 255
"""Steps between the smallest byte and the largest."""
_TIGHTEST, _CUTS = 0.2, 33
"""Ranges that are tried: from this share of the whole to the whole, evenly."""

Range = tuple[float, float]
"""The smallest and the largest value; zero is within."""


class MinMax:
    """The smallest and the largest value of every tensor."""

    def __init__(self) -> None:
        self.ranges: dict[str, Range] = {}

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Take in a batch.

        Raises:
            DreamkitError: a value is not finite.
        """
        broken = []
        for name, value in values.items():
            low, high = map(float, value.aminmax())
            if not (abs(low) < float("inf") and abs(high) < float("inf")):  # so that nan is too
                broken.append(name)
                continue
            before = self.ranges.get(name, (0.0, 0.0))  # zero is within: it is what padding has
            self.ranges[name] = min(low, before[0]), max(high, before[1])
        if broken:
            raise DreamkitError(
                "the calibration images give values that are not finite, which have no range: at "
                f"{and_more(broken, 3)}. Give other images, or a network that is sound"
            )


@dataclass(frozen=True)
class Histogram:
    """How often the values of a tensor are where in its range.

    Args:
        range: the smallest and the largest.
        counts: of equal parts of it (BINS,) float64.
    """

    range: Range
    counts: Tensor


class Histograms:
    """Histograms of tensors whose ranges are known.

    Args:
        ranges: by name, of a pass over the same images.
    """

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges
        self._counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ranges}

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Take in a batch."""
        for name, value in values.items():
            low, high = self._ranges[name]
            if high > low:
                self._counts[name] += torch.histc(value, BINS, low, high)

    def histograms(self) -> dict[str, Histogram]:
        """Return what was counted."""
        return {n: Histogram(self._ranges[n], counts) for n, counts in self._counts.items()}


def least_error(histogram: Histogram, signed: bool, power: float = 2.0) -> Range:
    """Return the range in which 256 integers make the least error.

    The error of a value x is abs(x - q(x))^power, where q rounds to the nearest integer times the
    scale and cuts to the range. The ends are moved inwards apart from one another.

    Args:
        histogram: of the tensor.
        signed: whether the range is as far below zero as above it.
        power: 2 is the mean squared error; larger minds what is cut off more.
    """
    low, high = histogram.range
    if not high > low:
        return low, high
    shares = torch.linspace(_TIGHTEST, 1, _CUTS, dtype=torch.float64)
    if signed:
        ends = max(-low, high) * shares
        lows, highs = -ends, ends
    else:
        pairs = torch.cartesian_prod(
            low * (shares if low < 0 else shares[-1:]), high * (shares if high > 0 else shares[-1:])
        )
        lows, highs = pairs.unbind(1)
    where = histogram.counts > 0
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS, dtype=torch.float64)[where] + 0.5)
    counts = histogram.counts[where]
    errors = torch.cat(
        [
            _error(centres, counts, *some, signed, power)
            for some in zip(lows.split(64), highs.split(64), strict=True)
        ]
    )
    best = int(errors.argmin())
    return float(lows[best]), float(highs[best])


def _error(
    values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, signed: bool, power: float
) -> Tensor:
    """Return the error of each of some ranges (M,) over values (B,) with their counts."""
    levels = LEVELS - 1 if signed else LEVELS  # -127 to 127, so that zero is in the middle
    scales = ((highs - lows) / levels)[:, None]
    zeros = (-lows[:, None] / scales).round()
    kept = (((values / scales).round() + zeros).clamp(0, levels) - zeros) * scales
    return ((kept - values).abs() ** power * counts).sum(1)


def seen(
    take_in: Callable[[Mapping[str, Tensor]], None], values: Iterable[Mapping[str, Tensor]]
) -> None:
    """Show every batch to a collector."""
    for batch in values:
        take_in(batch)
