"""What a pruned network may cost, what it does cost, and what it would once more is gone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import nn

from dreamkit.errors import NothingToPrune
from dreamkit.evaluation.cost import count
from dreamkit.latency.table import LookUpTable
from dreamkit.pruning.cost_model import CostModel
from dreamkit.stages.forecast import Forecast
from dreamkit.stages.last_round import NEAR
from dreamkit.stages.measuring import Sized, sized, time_models
from dreamkit.types import ChannelGroup, Chunk, LatencyBackend, LayerShape, Teacher

Ratio = Annotated[float, Field(gt=0, lt=1)]
TOLERANCE = 0.05
"""By how much a measured latency may miss its budget."""


@dataclass(frozen=True)
class Target:
    """What is to be left; every goal that is given must be met.

    Args:
        flops: share of the teacher's FLOPs.
        params: share of its parameters.
        channels: share of the channels that can be pruned.
        latency: share of its latency, as it is measured on the target.
        latency_ms: milliseconds on the target.
    """

    flops: Ratio | None = None
    params: Ratio | None = None
    channels: Ratio | None = None
    latency: Ratio | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if not any(dataclasses.asdict(self).values()):
            raise ValueError("give at least one of flops, params, channels, latency, latency_ms")

    @property
    def timed(self) -> bool:
        """Whether a latency is a goal."""
        return self.latency is not None or self.latency_ms is not None


class Budget:
    """The goals of a pruning run as shares of what its teacher costs.

    A latency is predicted by the look-up table while channels go, and measured when the prediction
    meets the goal. If the measurement does not, the prediction is corrected by it. A goal that the
    teacher meets already is held while the others are sought.

    Args:
        target: the goals.
        teacher: what shares are of.
        size: (C, H, W) of an image that what is pruned takes.
        table: predicts latencies.
        channels: how many of the teacher's can be pruned.
        latency: times models on the target.
        teacher_ms: its latency, where an earlier try of the run measured it.
        note: told what the user must know of the goals and of timings.

    Raises:
        NothingToPrune: the teacher is as fast as asked for already, and nothing else is asked for.
    """

    def __init__(
        self,
        target: Target,
        teacher: Teacher,
        table: LookUpTable,
        channels: int,
        latency: LatencyBackend,
        teacher_ms: float | None = None,
        note: Callable[[str], None] = lambda text: None,
        size: tuple[int, int, int] | None = None,
    ) -> None:
        self.teacher = teacher
        self.table = table
        self.latency = latency
        self.correction = 1.0
        self.teacher_ms = teacher_ms
        self.target = target
        whole = teacher.card.input_size
        self.size = whole if size is None else size
        stated = {name: getattr(target, name) for name in ("flops", "params", "channels")}
        self.goals: dict[str, float] = {k: v for k, v in stated.items() if v is not None}
        self.note = note
        if target.timed:
            if teacher_ms is None:
                self.teacher_ms = self._measured({"teacher": sized(teacher)})["teacher"]
            self.goals["latency"] = self._latency_goal(target)
        self.before = self._counts(teacher.model, channels, whole)
        if target.timed:
            self.before["latency"] = self._predicted(teacher.model, whole)

    def _latency_goal(self, target: Target) -> float:
        assert self.teacher_ms is not None
        shares = [] if target.latency is None else [target.latency]
        if target.latency_ms is not None:
            shares.append(target.latency_ms / self.teacher_ms)
            if shares[-1] >= 1:
                met = (
                    f"the teacher takes {self.teacher_ms:.3f} ms here, which meets the budget of "
                    f"{target.latency_ms} ms already"
                )
                if not self.goals and target.latency is None:
                    raise NothingToPrune(f"{met}: ask for less", ("target", "latency_ms"))
                self.note(f"{met}: it is kept while the other goals are sought")
        return min(shares)

    def _measured(self, networks: Mapping[str, Sized]) -> dict[str, float]:
        timings = time_models(networks, self.latency, self.note)
        return {name: timing.median_ms for name, timing in timings.items()}

    def latency_ms(self, teacher_ms: float) -> float:
        """Return the latency that is asked for, in milliseconds.

        Args:
            teacher_ms: the teacher's, measured beside it.
        """
        share, limit = self.target.latency, self.target.latency_ms
        return min(math.inf if limit is None else limit, (share or math.inf) * teacher_ms)

    def missed(self, student_ms: float, teacher_ms: float) -> str | None:
        """Return a sentence if a finished student misses its latency budget, else None.

        Args:
            student_ms: its latency.
            teacher_ms: the teacher's, measured beside it.
        """
        budget = self.latency_ms(teacher_ms)
        if student_ms <= (1 + TOLERANCE) * budget:
            return None
        return (
            f"the student takes {student_ms:.3f} ms and was to take {budget:.3f} ms; its latency "
            "was within the budget when pruning ended, so either the machine was busy or timings "
            f"of this length vary by more than {TOLERANCE:.0%} here"
        )

    @property
    def costs(self) -> dict[str, Callable[[LayerShape], float]]:
        """What a layer of some shape costs, for every goal but channels."""
        known: dict[str, Callable[[LayerShape], float]] = {
            "flops": lambda shape: shape.flops,
            "params": lambda shape: shape.params,
            "latency": self.table.predict,
        }
        return {name: cost for name, cost in known.items() if name in self.goals}

    def _counts(
        self, model: nn.Module, channels: int, size: tuple[int, int, int]
    ) -> dict[str, float]:
        cost = count(model, size)
        return {"channels": channels, "flops": cost.flops, "params": cost.params}

    def _predicted(self, model: nn.Module, size: tuple[int, int, int]) -> float:
        shapes = self.table.shapes(model, size)
        self.table.prepare(shapes.values())
        return CostModel(shapes).total(self.table.predict)

    def counted(self, model: nn.Module, channels: int) -> dict[str, float]:
        """Return what a model costs as shares of the teacher's, without a measurement.

        Args:
            model: pruned.
            channels: how many of it can be pruned further.
        """
        counts = self._counts(model, channels, self.size)
        return {name: amount / self.before[name] for name, amount in counts.items()}

    def shares(self, model: nn.Module, channels: int) -> dict[str, float]:
        """Return what a model costs as shares of the teacher's, its latency as predicted.

        Args:
            model: pruned.
            channels: how many of it can be pruned further.
        """
        shares = self.counted(model, channels)
        if "latency" in self.goals:
            predicted = self._predicted(model, self.size) / self.before["latency"]
            shares["latency"] = self.correction * predicted
        return shares

    def met(self, shares: Mapping[str, float]) -> bool:
        """Whether every goal is reached."""
        return all(shares[name] <= goal for name, goal in self.goals.items())

    def within(self, most: float, shares: Mapping[str, float]) -> bool:
        """Whether every goal is as near as ``most``, a share of what the teacher costs."""
        return all(shares[name] - goal <= most for name, goal in self.goals.items())

    def overshot(self, shares: Mapping[str, float]) -> bool:
        """Whether every goal is reached, and none was nearly missed: more went than had to."""
        return all(goal - shares[name] > NEAR for name, goal in self.goals.items())

    def towards(self, goals: Mapping[str, float]) -> Budget:
        """Return a budget of the same costs with other goals: shares, by name."""
        nearer = copy.copy(self)
        nearer.goals = dict(goals)
        return nearer

    def progress(self, shares: Mapping[str, float]) -> float:
        """Return the share of the way to the goal that is furthest, 1 where all are reached."""
        ways = ((1 - shares[name]) / (1 - goal) for name, goal in self.goals.items() if goal < 1)
        return min(ways)

    def verified(self, model: nn.Module, shares: Mapping[str, float]) -> dict[str, float]:
        """Measure the latency where it is a goal; return the shares with it, and learn from it.

        Args:
            model: pruned.
            shares: as predicted.
        """
        if "latency" not in self.goals:
            return dict(shares)
        found = self._measured({"model": (model, self.size), "teacher": sized(self.teacher)})
        share = self.goals["latency"] * found["model"] / self.latency_ms(found["teacher"])
        self.correction *= share / shares["latency"]
        return {**shares, "latency": share}

    def forecast(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        shares: Mapping[str, float],
        goals: Mapping[str, float] | None = None,
    ) -> Forecast:
        """Return what tells, chunk by chunk, what a model would cost.

        Args:
            model: as it is.
            groups: of it.
            shares: its.
            goals: that are asked for; all by default.
        """
        goals = self.goals if goals is None else goals
        costs = {name: cost for name, cost in self.costs.items() if name in goals}
        channels = sum(group.channels for group in groups)
        cost_model = CostModel(self.table.shapes(model, self.size))
        return Forecast(cost_model, costs, shares, channels, goals)

    def needs(
        self,
        model: nn.Module,
        shares: Mapping[str, float],
        most: float,
        chunks: Sequence[Sequence[Chunk]],
    ) -> list[tuple[Callable[[ChannelGroup, int], float], float]]:
        """Return what a round has to save, as a knapsack takes it.

        Args:
            model: as it is.
            shares: its.
            most: share of what the teacher costs that a round saves at the most.
            chunks: of each group, in the order in which they may go.
        """
        cost_model = CostModel(self.table.shapes(model, self.size))
        if "latency" in self.goals:
            # Together: a machine changes more from one run to the next than a chunk saves.
            changed = (
                shape
                for group in chunks
                for channels in itertools.accumulate(len(chunk.channels) for chunk in group)
                for shape in group[0].group.shapes_without(cost_model.shapes, channels).values()
            )
            self.table.prepare(itertools.chain(cost_model.shapes.values(), changed))
        found: list[tuple[Callable[[ChannelGroup, int], float], float]] = []

        def saved(cost: Callable[[LayerShape], float], group: ChannelGroup, channels: int) -> float:
            return cost_model.saved(group, channels, cost)

        for name, goal in self.goals.items():
            share = min(most, shares[name] - goal)
            if share <= 0:
                continue
            if name == "channels":
                found.append((lambda group, channels: channels, share * self.before[name]))
                continue
            cost = self.costs[name]
            # Shapes do not tell all of a cost: what is saved is a share of what they do tell.
            need = share / shares[name] * cost_model.total(cost)
            found.append((partial(saved, cost), need))
        return found
