"""What a model would cost once some of its channels are gone, as shares of its teacher's."""

from __future__ import annotations

from collections.abc import Mapping

from dreamkit.pruning.cost_model import Cost, CostModel
from dreamkit.types import ChannelGroup, Chunk


class Forecast:
    """Shares of the teacher's costs, told from layers' shapes while channels go in thought.

    What shapes do not tell of a cost is taken to fall as what they do tell.

    Args:
        cost_model: of the model as it is.
        costs: of a layer, by goal; ``channels`` needs none.
        shares: that the model costs now.
        channels: that it has now, of those that can be pruned.
        goals: shares that are to be reached.
    """

    def __init__(
        self,
        cost_model: CostModel,
        costs: Mapping[str, Cost],
        shares: Mapping[str, float],
        channels: int,
        goals: Mapping[str, float],
    ) -> None:
        self.cost_model = cost_model
        self.costs = costs
        self.goals = goals
        self.sought = [name for name, goal in goals.items() if shares[name] > goal]
        """Goals that are not reached yet."""
        self._left = channels
        before = {name: cost_model.total(cost) for name, cost in costs.items()}
        before["channels"] = channels
        self._units = {name: shares[name] / before[name] for name in goals}

    def take(self, group: ChannelGroup, channels: int) -> None:
        """Take channels of a group away, or give them back where the number is negative."""
        self.cost_model.take(group, channels)
        self._left -= channels

    def shares(self) -> dict[str, float]:
        """Return what is left, of every goal."""
        return {name: self._share(name) for name in self.goals}

    def _share(self, name: str) -> float:
        cost = self.costs.get(name)
        left = self._left if cost is None else self.cost_model.total(cost)
        return self._units[name] * left

    def met(self) -> bool:
        """Whether every goal is reached."""
        return all(self._share(name) <= goal for name, goal in self.goals.items())

    def excess(self) -> float:
        """Return by how much more of the teacher the goals that are sought are overshot, at least.

        Below 0 where one is not reached.
        """
        return min((self.goals[name] - self._share(name) for name in self.sought), default=0.0)

    def enough(self, chunk: Chunk) -> bool:
        """Take a chunk; return whether every goal is reached."""
        self.take(chunk.group, len(chunk.channels))
        return self.met()
