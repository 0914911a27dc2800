"""Choosing what goes in a round of pruning, and whether a target can be reached at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from dreamkit.errors import NothingToPrune, placed
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.selection import removable
from dreamkit.stages.budget import Budget
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.importances import Importances
from dreamkit.stages.last_round import LastRound
from dreamkit.types import ChannelGroup, Saved, SelectionStep


class Choosing:
    """What goes in each round: by the recipe's selection, and no more than the target asks for.

    Args:
        options: of the pruning.
        budget: its goals.
        importances: has the limits, and the channels of each group before any pruning.
        note: told what the user must know.
    """

    def __init__(
        self,
        options: ChannelPruning,
        budget: Budget,
        importances: Importances,
        note: Callable[[str], None],
    ) -> None:
        self.options = options
        self.budget = budget
        self.importances = importances
        self.note = note

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> tuple[dict[str, list[int]], bool]:
        """Choose channels.

        Args:
            model: as it is.
            groups: of it.
            scores: importances (channels,) of the groups that may lose some, by name.
            shares: what the model costs.

        Returns:
            The channels to remove of each group, by name, and whether the target was to be met
            without them: if it is not, more goes by the same ranking.

        Raises:
            NothingToPrune: the limits let none go.
            PluginError: the selection chose what it may not.
        """
        options, budget = self.options, self.budget
        originals, limits = self.importances.originals, self.importances.limits
        multiple = self.importances.multiple
        ranked = [group for group in groups if group.name in scores]
        ordered = [scores[group.name] for group in ranked]
        chunks = removable(ranked, ordered, originals, limits, multiple)
        asked: list[bool] = []
        """Whether all that is lacking was asked for, once a selection asks what is."""

        def shortfall() -> Sequence[tuple[Saved, float]]:
            asked.append(budget.within(options.step, shares))
            return budget.needs(model, shares, options.step, chunks)

        step = SelectionStep(
            chunks=chunks,
            channels=max(1, round(options.step * sum(originals.values()))),
            enough=budget.forecast(model, groups, shares).enough,
            shortfall=shortfall,
            note=self.note,
        )
        with placed("selection"):
            chosen = options.selection(step)
            last = LastRound(chunks, chosen, budget.forecast(model, groups, shares))
        if not any(chosen.values()):
            self._give_up(shares)
        if not last.met:
            # What chunks save is told group by group: too much where two meet in a layer.
            return chosen, any(asked)
        last.trim(swap="latency" not in budget.goals)
        return last.chosen(), True

    def check_reach(self, graph: ChannelGraph) -> None:
        """Refuse a target that is out of reach even if all goes that the limits let go.

        A latency is not asked for: to tell it takes measurements.

        Args:
            graph: of the model before pruning.

        Raises:
            NothingToPrune: it is; the message names what is reachable.
        """
        budget = self.budget
        goals = {name: goal for name, goal in budget.goals.items() if name != "latency"}
        groups, _ = graph.groups()
        gone = {g.name: sum(self.importances.chunks(g)) for g in groups}
        now = budget.counted(graph.model, sum(group.channels for group in groups))
        forecast = budget.forecast(graph.model, groups, now, goals)
        for group in groups:
            forecast.take(group, gone[group.name])
        if forecast.met():
            return
        # Shapes do not tell of all layers: a refusal is to be exact.
        small, _ = graph.without({name: range(channels) for name, channels in gone.items()})
        left = sum(group.channels - gone[group.name] for group in groups)
        shares = budget.counted(small, left)
        if any(shares[name] > goal for name, goal in goals.items()):
            self._give_up(shares)

    def _give_up(self, shares: Mapping[str, float]) -> None:
        reached = ", ".join(
            f"{name} {shares[name]:.3f} (target {goal:.3f})"
            for name, goal in self.budget.goals.items()
            if name in shares
        )
        narrowed = self.importances.limits is not self.options.limits
        also = " or sensitivity.max_drop" if narrowed else ""
        raise NothingToPrune(
            f"the target is out of reach within the limits: {reached}. Raise limits.max_ratio"
            f"{also}, lower limits.min_channels or limits.chunk, or set an easier target",
            ("target",),
        )
