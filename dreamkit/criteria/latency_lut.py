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

    Latency falls in steps: on a processor that computes channels in blocks of 16, 62 take no less
    time than 50, and more than 64. So the change is told for as many channels as save the most per
    channel, up to a block: whoever takes the first chunk of a block is on the way to its end.
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
        most = min(max(step.chunk, step.latency.block), group.channels - 1)
        if most < 1:
            return 0.0

        def change(removed: int) -> float:
            after = group.shapes_without(shapes, removed)
            return sum(
                step.latency.predict(shape) - step.latency.predict(shapes[layer])
                for layer, shape in after.items()
            )

        counts = range(min(step.chunk, most), most + 1, step.chunk)
        return min(change(removed) / removed for removed in counts)
