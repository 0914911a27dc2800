"""How well a latency table tells what whole networks take."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


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
