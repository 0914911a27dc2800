"""The last round of pruning goes chunk by chunk: no more than the target asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamkit.errors import PluginError
from dreamkit.stages.forecast import Forecast
from dreamkit.types import Chunk

NEAR = 0.005
"""Share of what the teacher costs by which a target may be overshot where chunks are small."""


class LastRound:
    """What was chosen in a round, to be made to end at the target.

    Args:
        chunks: of each group, in the order in which they may go.
        chosen: the channels of each group that are to go, by name.
        forecast: of the model as it is; changed.

    Raises:
        PluginError: of a group other channels were chosen than those of its first chunks.
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[Chunk]],
        chosen: Mapping[str, Sequence[int]],
        forecast: Forecast,
    ) -> None:
        self.chunks = [group for group in chunks if group]
        self.forecast = forecast
        self.taken = [0] * len(self.chunks)
        for place, group in enumerate(self.chunks):
            wanted = len(chosen.get(group[0].group.name, ()))
            while wanted > 0 and self.taken[place] < len(group):
                wanted -= len(group[self.taken[place]].channels)
                self._take(place)
        if _sorted(chosen) != _sorted(self.chosen()):
            raise PluginError(
                "a selection takes whole chunks of a group, none before an earlier one, and this "
                "one took others; dreamkit.plugin.testing.check_selection tells where"
            )

    @property
    def met(self) -> bool:
        """Whether the target is met by what was chosen, as it is forecast."""
        return self.forecast.met()

    def chosen(self) -> dict[str, list[int]]:
        """Return the channels to remove of each group, by name."""
        found = {}
        for group, taken in zip(self.chunks, self.taken, strict=True):
            if taken:
                channels = [channel for chunk in group[:taken] for channel in chunk.channels]
                found[group[0].group.name] = channels
        return found

    def trim(self, swap: bool) -> None:
        """Give chunks back that the target does not need, the most important first.

        Where a large one still leads too far, smaller ones take its place.

        Args:
            swap: whether they may; what they save must be known without a measurement.
        """
        self._give_back()
        if swap and self.forecast.excess() > NEAR:
            before, excess = list(self.taken), self.forecast.excess()
            self._swap()
            if not 0 <= self.forecast.excess() < excess:
                self._return_to(before)

    def _give_back(self) -> None:
        needed: set[int] = set()
        while sum(self.taken) > 1:  # without a chunk gone a round would not end
            places = [p for p, taken in enumerate(self.taken) if taken and p not in needed]
            if not places:
                return
            place = max(places, key=lambda p: self.chunks[p][self.taken[p] - 1].importance)
            self._give(place)
            if not self.met:
                self._take(place)
                needed.add(place)  # and stays so, as less and less is to spare

    def _swap(self) -> None:
        """Put less important and smaller chunks in the place of the one that saves the most."""
        largest = min((p for p, taken in enumerate(self.taken) if taken), key=self._excess_without)
        self._give(largest)
        barred = {largest}
        while not self.met:
            places = [
                place
                for place, group in enumerate(self.chunks)
                if place not in barred and self.taken[place] < len(group)
            ]
            if not places:
                return
            place = min(places, key=lambda p: self.chunks[p][self.taken[p]].importance)
            self._take(place)
            if self.forecast.excess() > NEAR:
                self._give(place)
                barred.add(place)
        self._give_back()

    def _excess_without(self, place: int) -> float:
        self._give(place)
        excess = self.forecast.excess()
        self._take(place)
        return excess

    def _return_to(self, taken: Sequence[int]) -> None:
        for place, count in enumerate(taken):
            while self.taken[place] > count:
                self._give(place)
            while self.taken[place] < count:
                self._take(place)

    def _take(self, place: int) -> None:
        chunk = self.chunks[place][self.taken[place]]
        self.forecast.take(chunk.group, len(chunk.channels))
        self.taken[place] += 1

    def _give(self, place: int) -> None:
        self.taken[place] -= 1
        chunk = self.chunks[place][self.taken[place]]
        self.forecast.take(chunk.group, -len(chunk.channels))


def _sorted(chosen: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: sorted(channels) for name, channels in chosen.items() if len(channels)}
