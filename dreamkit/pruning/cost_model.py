"""What a model would cost once some channels are gone, told from its layers' shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dreamkit.types import ChannelGroup, LayerShape

Cost = Callable[[LayerShape], float]
"""What one layer costs: FLOPs, parameters or milliseconds."""


class CostModel:
    """The shapes of a model's convolutions and linear layers, while channels are taken in thought.

    Args:
        shapes: by name, as they are.
    """

    def __init__(self, shapes: Mapping[str, LayerShape]) -> None:
        self.shapes = dict(shapes)

    def take(self, group: ChannelGroup, channels: int) -> None:
        """Take some channels of a group away."""
        self.shapes |= group.shapes_without(self.shapes, channels)

    def total(self, cost: Cost) -> float:
        """Return what all layers cost."""
        return sum(cost(shape) for shape in self.shapes.values())

    def saved(self, group: ChannelGroup, channels: int, cost: Cost) -> float:
        """Return what taking some channels of one group, and no others, would save."""
        after = group.shapes_without(self.shapes, channels)
        return sum(cost(self.shapes[layer]) - cost(shape) for layer, shape in after.items())
