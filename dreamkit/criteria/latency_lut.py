"""The latency that removing channels saves."""

from __future__ import annotations

import dataclasses
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
        after: dict[str, LayerShape] = {}
        for member in group.members:
            if member.layer in shapes:
                # A flattened feature map gives a linear layer several inputs for each channel.
                gone = round(removed * len(member.index) / group.channels)
                shape = after.get(member.layer, shapes[member.layer])
                after[member.layer] = without(shape, member.axis, gone)
        change = sum(
            step.latency.predict(shape) - step.latency.predict(shapes[layer])
            for layer, shape in after.items()
        )
        return change / removed


def without(shape: LayerShape, axis: str, channels: int) -> LayerShape:
    """Return a layer's shape with fewer channels on one axis; depthwise layers lose on both."""
    if shape.depthwise:
        left = shape.c_out if axis == "in" else max(shape.c_out - channels, 1)
        return dataclasses.replace(shape, c_in=left, c_out=left, groups=left)
    if axis == "out":
        return dataclasses.replace(shape, c_out=max(shape.c_out - channels, 1))
    return dataclasses.replace(shape, c_in=max(shape.c_in - channels, 1))
