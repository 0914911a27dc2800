"""What a pruning in rounds has come to, kept and gone on with."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from dreamkit.errors import placed
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import load_state, seeded, tensors_of
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.seeds import stream
from dreamkit.stages.budget import Budget
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.choosing import Choosing
from dreamkit.stages.compensating import Compensating
from dreamkit.stages.depth import Settle
from dreamkit.stages.importances import Importances
from dreamkit.stages.latency_tables import read_tables, save_table
from dreamkit.stages.pauses import Pauses
from dreamkit.stages.pruning_checkpoint import PruningCheckpoint
from dreamkit.stages.reconstructing import reconstruct_student
from dreamkit.stages.reference import Reference
from dreamkit.stages.samples import Parts, fitting_sample
from dreamkit.stages.sensitivity import Measured
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import trainable_copy
from dreamkit.training.batches import NormalisedBatches, drawn
from dreamkit.training.difference_statistics import seen_by
from dreamkit.training.statistics import take_statistics
from dreamkit.types import Images, RunContext, Teacher


class PruningState:
    """What a pruning has come to: the student, its channel graph, the record of what was cut.

    It is kept after every round, and gone on with.

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
        self.table = read_tables(context, options.latency_table)
        self.graph = self._graph()
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

    def _graph(self) -> ChannelGraph:
        context = self.context
        with context.log.progress("following channels", 1):
            size = self.card.input_size
            return ChannelGraph(self.student, size, self.cut, context.channel_rules)

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

    def _bypass(self, blocks: list[str]) -> None:
        for block in blocks:
            self.cut.bypass(self.student, block)
        if blocks:
            self.graph = self._graph()
            self.importances.follow(self.graph.groups()[0])

    def _settle(self) -> None:
        """Fit the student to what it lost, or take BatchNorm's statistics."""
        options, context, teacher = self.options, self.context, self.teacher
        student, images = self.student, self.images
        fit = options.reconstruction if options.reconstruct_each else None
        if fit is not None:
            reconstruct_student(teacher, student, self.cut, images, fit, context)
        else:
            how, sample, size = options.statistics, self.statistics_of, options.batch_size
            whole, kept = self.reference.network, self.reference.kept(self.cut)
            give_statistics(how, whole, student, kept, sample, size, context)

    def _looked_at(self, what: str, count: int) -> Images:
        return drawn(self.parts.looked_at, count, stream(self.context.seed, what))

    def _statistics_batches(self, images: int | None = None) -> NormalisedBatches:
        size, device = self.options.batch_size, self.context.device
        most = None if images is None else -(-images // size)
        return NormalisedBatches(self.statistics_of, self.card, device, size, most)

    def _settling(self, images: int) -> Settle:
        """Return what gives networks to be looked at, each rank its own, their statistics."""
        batches = self._statistics_batches(images)
        how, network = self.options.statistics, self.teacher.model
        seen = seen_by(network, batches) if how == "difference" else None

        def take(smaller: nn.Module, record: PruningRecord) -> None:
            take_statistics(how, smaller, network, record.kept, batches, together=False, seen=seen)

        return take

    def _save(self) -> None:
        save_table(self.table, self.context)
        tensors = prefixed("student", tensors_of(self.student))
        tensors |= prefixed("importances", self.importances.state())
        tensors |= self.reference.state()
        metrics = self.context.log.metrics
        facts = {
            "bypassed": self.cut.bypassed,
            "depth": self.context.log.details.get("depth", []),
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
        self._bypass(facts["bypassed"])
        if facts["depth"]:
            self.context.log.details["depth"] = facts["depth"]
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
