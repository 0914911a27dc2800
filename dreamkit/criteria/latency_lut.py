"""The latency that removing channels saves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.types import Criterion, LayerShape, PruningStep


@dataclass(frozen=True)
class LatencyLUT(Criterion):
    """Change of latency by removing channels, from a look-up table measured on the target.

    Hardware-aware importance of DeepInversion, eq. 10: I = I_err + η·I_lat with
    I_lat = LAT(after) - LAT(before) in milliseconds a channel, negative where removal saves
    time, so that such channels go first. η is the term's weight in the recipe.

    Latency falls in steps: on a processor that computes channels in blocks of 16, 62 take no less
    time than 50, and more than 64. So the change is told for as many of the chunks that may go as
    save the most per channel, up to a block: whoever takes the first is on the way to its end.
    """

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return milliseconds a channel, one tensor (channels,) for each group."""
        shapes = step.latency.shapes(step.model, step.card.input_size)
        pruned = [
            {
                removed: group.shapes_without(shapes, removed)
                for removed in _ahead(chunks, step.latency.block)
            }
            for group, chunks in zip(step.groups, step.chunks, strict=True)
        ]
        changed = (
            shape for group in pruned for after in group.values() for shape in after.values()
        )
        # Before and after together: a machine changes more than a chunk saves.
        step.latency.prepare(itertools.chain(shapes.values(), changed))

        def change(after: dict[str, LayerShape]) -> float:
            return sum(
                step.latency.predict(shape) - step.latency.predict(shapes[layer])
                for layer, shape in after.items()
            )

        saved = [
            min((change(after) / removed for removed, after in group.items()), default=0.0)
            for group in pruned
        ]
        return [
            torch.full((group.channels,), value)
            for group, value in zip(step.groups, saved, strict=True)
        ]


def _ahead(chunks: Sequence[int], block: int) -> list[int]:
    """Return how many channels are gone after each chunk, until a block of them is."""
    totals = list(itertools.accumulate(chunks))
    return [total for total in totals if total <= max(block, totals[0])]
