"""The latency that removing channels saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import ChannelGroup, LayerShape, PruningStep


@dataclass(frozen=True)
class LatencyLUT:
    """Change of latency by removing channels, from a look-up table measured on the target.

    Hardware-aware importance of DeepInversion, eq. 10: I = I_err + η·I_lat with
    I_lat = LAT(after) - LAT(before) in milliseconds a channel, negative where removal saves
    time, so that such channels go first. η is the term's weight in the recipe.
    """

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return milliseconds a channel, one tensor (channels,) for each group."""
        shapes = step.latency.shapes(step.model, step.card.input_size)
        return [
            torch.full((group.channels,), self._saving(step, group, shapes))
            for group in step.groups
        ]

    def _saving(
        self, step: PruningStep, group: ChannelGroup, shapes: dict[str, LayerShape]
    ) -> float:
        removed = min(step.chunk, group.channels - 1)
        if removed < 1:
            return 0.0
        after = group.shapes_without(shapes, removed)
        change = sum(
            step.latency.predict(shape) - step.latency.predict(shapes[layer])
            for layer, shape in after.items()
        )
        return change / removed
