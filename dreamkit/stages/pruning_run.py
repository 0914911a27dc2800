"""Structured pruning in rounds: rank channels, remove the least important, look, go on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import nn

from dreamkit.allocator import give_back
from dreamkit.errors import NothingToPrune, TeacherMismatch
from dreamkit.model_state import seeded
from dreamkit.out_of_memory import enough_memory
from dreamkit.pruning.activations import weighted_layers
from dreamkit.pruning.blocks import residual_blocks
from dreamkit.pruning.record import PruningRecord
from dreamkit.stages.choosing import Choosing
from dreamkit.stages.comparing import Comparing
from dreamkit.stages.depth import BlockRemoval, Depth
from dreamkit.stages.measuring import glance
from dreamkit.stages.pruning_state import PruningState
from dreamkit.stages.ranking import without
from dreamkit.stages.sensitivity import Sensitivity, measure_sensitivity
from dreamkit.teachers.checking import check_outputs
from dreamkit.training.batches import NormalisedBatches
from dreamkit.types import RoundPruned, Teacher


class PruningRun(PruningState):
    """One pruning under way, in rounds.

    Args and errors are those of ``PruningState``.
    """

    def reach_target(self) -> None:
        """Rank and remove until the target is met.

        Raises:
            NothingToPrune: the limits are reached before the target.
        """
        log, budget = self.context.log, self.budget
        cure = f"lower batch_size ({self.options.batch_size} now)"
        short = enough_memory("pruning", cure, ("batch_size",))
        with log.progress("pruning", 1000) as advance, seeded(self.context.seed), short:
            tried = self.rounds > 0 or "depth" in log.details
            if self.options.depth is not None and not tried:
                self._remove_blocks(self.options.depth)
            if self.options.sensitivity is not None and self.importances.measured is None:
                self._measure_groups(self.options.sensitivity)
            while not budget.met(self.shares):
                start = time.perf_counter()
                self._end_round(self._round(), start)
                advance(max(0, min(1000, round(1000 * budget.progress(self.shares)))))
        log.metrics["pruning.seconds"] = self.seconds
        log.metrics["pruned.rounds"] = self.rounds
        for name, share in self.shares.items():
            log.metrics[f"pruned.{name}_ratio"] = share

    def _end_round(self, removed: int, start: float) -> None:
        log = self.context.log
        self.seconds += time.perf_counter() - start
        self.rounds += 1
        numbers = self._look(removed)
        log.record("pruning", self.rounds, numbers)
        self._save()
        give_back()  # tensors of a smaller network leave holes between those of this one
        log.emit(RoundPruned(round=self.rounds, numbers=numbers))
        log.check(together=True)

    def _round(self) -> int:
        """Rank, remove, adjust to the loss, measure; return how many channels went."""
        groups, _ = self.graph.groups()
        scores = self.importances(self.student, groups)
        batches = self._statistics_batches()
        self.compensating.look(self.student, groups, batches)
        removed, ending = 0, True
        # Where counting finds more than shapes told, the rest goes by the same ranking.
        while ending and not self.budget.met(self.shares):
            chosen, ending = self.choosing(self.student, groups, scores, self.shares)
            self._remove(chosen)
            scores = without(scores, chosen)
            groups, _ = self.graph.groups()
            self.shares = self.budget.shares(self.student, sum(g.channels for g in groups))
            removed += sum(len(channels) for channels in chosen.values())
        self._settle()
        self._train()
        if self.budget.met(self.shares):
            self.shares = self.budget.verified(self.student, self.shares)
        return removed

    def _remove(self, chosen: dict[str, list[int]]) -> None:
        self.compensating.make_up(self.student, self.graph.groups()[0], chosen)
        for parameter in self.student.parameters():
            parameter.grad = None  # of the old shape
        self.graph.remove(chosen)
        self.removed.append(chosen)
        self._check_runs(chosen)
        self.importances.ranking.forget(chosen)

    def _check_runs(self, chosen: dict[str, list[int]]) -> None:
        try:
            check_outputs(Teacher(self.student, self.card, {}))
        except TeacherMismatch as error:
            raise NothingToPrune(
                f"{self.card.name} no longer runs once channels of {', '.join(sorted(chosen))} "
                f"are removed, so its code fixes their number: {error}"
            ) from error

    def _train(self) -> None:
        options, student = self.options, self.student
        fit = options.reconstruct_each
        trained = self.pauses.after_round(self.rounds + 1, student, self.cut.kept)
        # Weights are fitted to the stored statistics only where a training left these alone.
        frozen = options.finetune is not None and options.finetune.freeze_bn
        if trained and frozen and not fit and options.statistics == "difference":
            self.reference.become(student, self.cut, len(self.removed))

    def _look(self, removed: int) -> dict[str, float]:
        """Return what a round's record holds; latency where a criterion or a goal asked for it."""
        timed = self.table.asked
        seen = glance(self.student, self.teacher, self.parts, self.context, timed)
        # Of two looks at agreement the one that decided on a training is told.
        return {"removed_channels": float(removed), **self.shares, **seen, **self.pauses.looked}

    def _remove_blocks(self, options: Depth) -> None:
        """Let whole blocks go while that does less harm than channels do: the first round."""
        start, device = time.perf_counter(), self.context.device
        example = torch.zeros(2, *self.card.input_size, device=device)
        limits = self.options.limits
        held = [name for name, _ in weighted_layers(self.student) if limits.hold(name)]
        blocks = [
            block
            for block in residual_blocks(self.student, example)
            if not any(layer.startswith(f"{block}.") for layer in held)
        ]
        if not blocks or self.options.target.channels is not None or self.budget.met(self.shares):
            return
        images = self._looked_at("depth", options.images)
        batches = NormalisedBatches(images, self.card, device, self.options.batch_size)
        removal = BlockRemoval(
            options.margin,
            blocks,
            self.teacher,
            self.budget,
            Comparing(self.teacher.model, batches),
            self._settling(options.images),
            self._less_channels,
            self.context,
        )
        while (found := removal(self.student, self.shares)) is not None:
            self._bypass([found.block])
            left = sum(group.channels for group in self.graph.groups()[0])
            self.shares = self.budget.shares(self.student, left)
        if not self.cut.bypassed:
            return
        self._settle()
        if self.budget.met(self.shares):
            self.shares = self.budget.verified(self.student, self.shares)
        self._end_round(0, start)

    def _less_channels(self, shares: Mapping[str, float]) -> tuple[nn.Module, PruningRecord]:
        """Return the student without the channels that would go to reach some shares."""
        groups, _ = self.graph.groups()
        before = self.importances.state()
        scores = self.importances(self.student, groups)
        self.importances.restore(before)  # a trial leaves no trace in the rounds to come
        self.compensating.look(self.student, groups, self._statistics_batches())
        goals = {name: shares[name] for name in self.budget.goals}
        at_once = dataclasses.replace(self.options, step=1.0)
        choosing = Choosing(
            at_once, self.budget.towards(goals), self.importances, lambda text: None
        )
        chosen, _ = choosing(self.student, groups, scores, self.shares)
        return self.graph.without(chosen, self.compensating.try_on)

    def _measure_groups(self, options: Sensitivity) -> None:
        """Find out what removing a part of each group does, before anything is cut."""
        scores = self.importances(self.student, self.graph.groups()[0])
        images = self._looked_at("sensitivity", options.images)
        batches = self._statistics_batches(options.images)
        self.compensating.look(self.student, self.graph.groups()[0], batches)
        make_up, take = self.compensating.try_on, self._settling(options.images)
        measured = measure_sensitivity(
            self.graph, self.teacher, scores, options, images, make_up, take, self.context
        )
        self.importances.know(measured)
        if not self.importances.open:
            raise NothingToPrune(
                f"no group may lose a channel: removing {options.shares[0]:.0%} of any costs more "
                f"than max_drop ({options.max_drop}) of the agreement, or is less than "
                "a chunk (limits.chunk). Raise max_drop, or other shares",
                ("sensitivity", "max_drop"),
            )
        self.choosing.check_reach(self.graph)
        self._save()  # it may have taken minutes
