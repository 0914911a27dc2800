"""Structured pruning in rounds: rank channels, remove the least important, look, go on."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dreamkit.allocator import give_back
from dreamkit.errors import NothingToPrune, TeacherMismatch, placed
from dreamkit.flat_state import below, prefixed
from dreamkit.latency.table import LookUpTable
from dreamkit.latency.table_file import read_table, table_text
from dreamkit.model_state import load_state, seeded, tensors_of
from dreamkit.out_of_memory import enough_memory
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.seeds import stream
from dreamkit.stages.budget import Budget
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.choosing import Choosing
from dreamkit.stages.compensating import Compensating
from dreamkit.stages.importances import Importances
from dreamkit.stages.measuring import glance
from dreamkit.stages.pauses import Pauses
from dreamkit.stages.pruning_checkpoint import PruningCheckpoint
from dreamkit.stages.ranking import without
from dreamkit.stages.reconstructing import reconstruct_student
from dreamkit.stages.reference import Reference
from dreamkit.stages.samples import Parts, fitting_sample
from dreamkit.stages.sensitivity import Measured, Sensitivity, measure_sensitivity
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import trainable_copy
from dreamkit.store.atomic import write_atomically
from dreamkit.teachers.checking import check_outputs
from dreamkit.training.batches import NormalisedBatches, drawn
from dreamkit.training.statistics import take_statistics
from dreamkit.types import (
    RoundPruned,
    RunContext,
    Teacher,
)


class PruningRun:
    """One pruning under way: the student, its channel graph, and the record of what was cut.

    Args:
        options: how.
        teacher: what is pruned; the student is a copy of it.
        context: the run's.
        whole: what the target's shares are of, where that is the teacher on larger images.

    Raises:
        NothingToPrune: no channel of the teacher can go, or not as many as the target asks for.
    """

    def __init__(
        self,
        options: ChannelPruning,
        teacher: Teacher,
        context: RunContext,
        whole: Teacher | None = None,
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.context = context
        self.card = teacher.card
        self.student = trainable_copy(teacher.model)
        self.cut = PruningRecord()
        self.reference = Reference(teacher)
        self.compensating = Compensating(options.compensation, options.statistics, context)
        self.removed: list[dict[str, list[int]]] = []
        self.rounds = 0
        self.seconds = 0.0
        self.table = self._read_tables()
        self.table.progress = context.log.progress
        rules = context.channel_rules
        with context.log.progress("following channels", 1):
            self.graph = ChannelGraph(self.student, self.card.input_size, self.cut, rules)
        groups, skipped = self.graph.groups()
        with placed("limits"):
            options.limits.check([*self.graph.makers, *(s.group for s in skipped)])
        context.log.details["pruning_skipped"] = [dataclasses.asdict(s) for s in skipped]
        self.importances = Importances(options, teacher, groups, self.table, context)
        self.importances.check_any(skipped)
        self.importances.check(self.student)
        self.checkpoint = PruningCheckpoint(teacher, context)
        found = self.checkpoint.found
        ms, total = found and found[1]["teacher_ms"], sum(g.channels for g in groups)
        goal, latency = options.target, context.latency  # what is timed on is drawn:
        with context.log.progress("measuring the teacher", 1), seeded(context.seed):
            note = context.log.note
            before, size = whole or teacher, self.card.input_size
            self.budget = Budget(goal, before, self.table, total, latency, ms, note, size)
            self.choosing = Choosing(options, self.budget, self.importances, note)
            self.choosing.check_reach(self.graph)
            self.shares = self.budget.shares(self.student, total)
            if self.budget.met(self.shares):  # smaller images may do
                self.shares = self.budget.verified(self.student, self.shares)

    def _read_tables(self) -> LookUpTable:
        """Return what is known of layers' latencies: by the run itself, and by the given table."""
        latency, given = self.context.latency, self.options.latency_table
        path = self.context.folder / RunContext.TABLE
        table = read_table(path, latency, note=self.context.log.note)
        if given is not None:
            with placed("latency_table"):
                known = read_table(Path(given), latency, strict=True)
            table.points = known.points | table.points
        return table

    def begin(self, parts: Parts) -> None:
        """Take the images that channels are ranked on; go on from a checkpoint if there is one."""
        options = self.options
        self.parts, self.images = parts, parts.fitted
        self.pauses = Pauses(options, self.teacher, parts, self.context)
        seed, size = self.context.seed, options.batch_size
        self.importances.begin(self.images)
        count = size * options.statistics_batches
        self.statistics_of = fitting_sample(self.images, count, seed, "statistics")
        found = self.checkpoint.go_on(self.images)
        if found is not None:
            self._restore(*found)

    # --- rounds -------------------------------------------------------------------------------

    def reach_target(self) -> None:
        """Rank and remove until the target is met.

        Raises:
            NothingToPrune: the limits are reached before the target.
        """
        log, budget = self.context.log, self.budget
        cure = f"lower batch_size ({self.options.batch_size} now)"
        short = enough_memory("pruning", cure, ("batch_size",))
        with log.progress("pruning", 1000) as advance, seeded(self.context.seed), short:
            if self.options.sensitivity is not None and self.importances.measured is None:
                self._measure_groups(self.options.sensitivity)
            while not budget.met(self.shares):
                start = time.perf_counter()
                removed = self._round()
                self.seconds += time.perf_counter() - start
                self.rounds += 1
                numbers = self._look(removed)
                log.record("pruning", self.rounds, numbers)
                self._save()
                give_back()  # tensors of a smaller network leave holes between those of this one
                log.emit(RoundPruned(round=self.rounds, numbers=numbers))
                log.check(together=True)
                advance(max(0, min(1000, round(1000 * budget.progress(self.shares)))))
        log.metrics["pruning.seconds"] = self.seconds
        log.metrics["pruned.rounds"] = self.rounds
        for name, share in self.shares.items():
            log.metrics[f"pruned.{name}_ratio"] = share

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
        self._adjust()
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

    def _measure_groups(self, options: Sensitivity) -> None:
        """Find out what removing a part of each group does, before anything is cut."""
        scores = self.importances(self.student, self.graph.groups()[0])
        looked = stream(self.context.seed, "sensitivity")
        images = drawn(self.parts.looked_at, options.images, looked)
        batches = self._statistics_batches(options.images)
        how, network = self.options.statistics, self.teacher.model

        def take(smaller: nn.Module, record: PruningRecord) -> None:
            # Each rank has networks of its own to look at.
            take_statistics(how, smaller, network, record.kept, batches, together=False)

        self.compensating.look(self.student, self.graph.groups()[0], batches)
        make_up = self.compensating.try_on
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

    def _statistics_batches(self, images: int | None = None) -> NormalisedBatches:
        size, device = self.options.batch_size, self.context.device
        most = None if images is None else -(-images // size)
        return NormalisedBatches(self.statistics_of, self.card, device, size, most)

    def _adjust(self) -> None:
        """Fit the student to what it lost, or take BatchNorm's statistics; then train it."""
        options, context, teacher = self.options, self.context, self.teacher
        student, images = self.student, self.images
        fit = options.reconstruction if options.reconstruct_each else None
        if fit is not None:
            reconstruct_student(teacher, student, self.cut, images, fit, context)
        else:
            how, sample, size = options.statistics, self.statistics_of, options.batch_size
            whole, kept = self.reference.network, self.reference.kept(self.cut)
            give_statistics(how, whole, student, kept, sample, size, context)
        trained = self.pauses.after_round(self.rounds + 1, student, self.cut.kept)
        # Weights are fitted to the stored statistics only where a training left these alone.
        frozen = options.finetune is not None and options.finetune.freeze_bn
        if trained and frozen and fit is None and options.statistics == "difference":
            self.reference.become(student, self.cut, len(self.removed))

    def _check_runs(self, chosen: dict[str, list[int]]) -> None:
        try:
            check_outputs(Teacher(self.student, self.card, {}))
        except TeacherMismatch as error:
            raise NothingToPrune(
                f"{self.card.name} no longer runs once channels of {', '.join(sorted(chosen))} "
                f"are removed, so its code fixes their number: {error}"
            ) from error

    # --- records ------------------------------------------------------------------------------

    def _look(self, removed: int) -> dict[str, float]:
        """Return what a round's record holds; latency where a criterion or a goal asked for it."""
        timed = self.table.asked
        seen = glance(self.student, self.teacher, self.parts, self.context, timed)
        # Of two looks at agreement the one that decided on a training is told.
        return {"removed_channels": float(removed), **self.shares, **seen, **self.pauses.looked}

    def _save(self) -> None:
        if self.table.points:
            path = self.context.folder / RunContext.TABLE
            write_atomically(path, table_text(self.table).encode())
        tensors = prefixed("student", tensors_of(self.student))
        tensors |= prefixed("importances", self.importances.state())
        tensors |= self.reference.state()
        metrics = self.context.log.metrics
        facts = {
            "removed": self.removed,
            "reference": self.reference.removals,
            "seconds": self.seconds,
            "shares": self.shares,
            "agreed": self.pauses.agreed,
            "sensitivity": self.context.log.details.get("sensitivity"),
            "teacher_ms": self.budget.teacher_ms,
            "correction": self.budget.correction,
            "training": {k: v for k, v in metrics.items() if k.startswith("training.")},
        }
        self.checkpoint.save(self.images, self.rounds, tensors, facts)

    def _restore(self, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on after the last round that an interrupted try finished."""
        self.removed = facts["removed"]
        for removals, chosen in enumerate(self.removed, 1):
            self.graph.remove(chosen)
            if removals == facts["reference"]:
                load_state(self.student, below("reference", state))
                self.reference.become(self.student, self.cut, removals)
        load_state(self.student, below("student", state))
        self.importances.restore(below("importances", state))
        self.rounds, self.seconds = facts["rounds"], facts["seconds"]
        self.pauses.agreed = facts["agreed"]
        if facts["sensitivity"] is not None:
            self.importances.know(Measured.from_json(facts["sensitivity"]))
        self.context.log.metrics |= facts["training"]
        self.shares, self.budget.correction = facts["shares"], facts["correction"]
