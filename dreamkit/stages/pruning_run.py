"""Structured pruning in rounds: rank channels, remove the least important, look, go on."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamkit import distributed
from dreamkit.errors import NothingToPrune, TeacherMismatch, placed
from dreamkit.flat_state import below, prefixed
from dreamkit.latency.table import LookUpTable
from dreamkit.latency.table_file import read_table, table_text
from dreamkit.model_state import load_state, seeded, tensors_of
from dreamkit.out_of_memory import enough_memory
from dreamkit.pruning.graph import ChannelGraph, Skipped
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import removable
from dreamkit.seeds import derived_seed, stream
from dreamkit.stages.budget import Budget
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.measuring import glance
from dreamkit.stages.pruning_checkpoint import PruningCheckpoint
from dreamkit.stages.ranking import Ranking
from dreamkit.stages.reconstructing import reconstruct_student
from dreamkit.stages.samples import Parts, fitting_sample
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import train_student, trainable_copy
from dreamkit.store.atomic import write_atomically
from dreamkit.teachers.checking import check_outputs
from dreamkit.training.batches import in_order
from dreamkit.types import (
    ChannelGroup,
    PruningStep,
    RoundPruned,
    RunContext,
    SelectionStep,
    Teacher,
)


class PruningRun:
    """One pruning under way: the student, its channel graph, and the record of what was cut.

    Args:
        options: how.
        teacher: what is pruned; the student is a copy of it.
        context: the run's.

    Raises:
        NothingToPrune: no channel of the teacher can go.
    """

    def __init__(self, options: ChannelPruning, teacher: Teacher, context: RunContext) -> None:
        self.options = options
        self.teacher = teacher
        self.context = context
        self.card = teacher.card
        self.student = trainable_copy(teacher.model)
        self.cut = PruningRecord()
        self.ranking = Ranking(options.criteria, options.normalise)
        self.generator = stream(context.seed, "criteria")
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
        self.originals = {group.name: group.channels for group in groups}
        self.open = {g.name for g in groups if options.limits.chunks(g, g.channels)}
        """Groups that the limits do not leave alone from the start; these are ranked."""
        self._check_any(groups, skipped)
        self.ranking.check(self.student, [g for g in groups if g.name in self.open])
        self.checkpoint = PruningCheckpoint(teacher, context)
        found = self.checkpoint.found
        ms, total = found and found[1]["teacher_ms"], sum(self.originals.values())
        goal, latency = options.target, context.latency  # what is timed on is drawn:
        with context.log.progress("measuring the teacher", 1), seeded(context.seed):
            note = context.log.note
            self.budget = Budget(goal, teacher, self.table, total, latency, ms, note)
        self.shares = dict.fromkeys(self.budget.before, 1.0)

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

    def _check_any(self, groups: list[ChannelGroup], skipped: list[Skipped]) -> None:
        if not self.open:
            chunk = self.options.limits.chunk
            blocked = skipped + [
                Skipped(g.name, f"{g.channels} channels leave no spare chunk of {chunk}")
                for g in groups
            ]
            listed = "".join(f"\n  {s.group}: {s.reason}" for s in blocked[:20])
            raise NothingToPrune(f"nothing of {self.card.name} can be pruned:{listed}", ("limits",))

    def begin(self, parts: Parts) -> None:
        """Take the images that channels are ranked on; go on from a checkpoint if there is one."""
        options = self.options
        self.parts, self.images = parts, parts.fitted
        seed, size = self.context.seed, options.batch_size
        count = size * options.ranking_batches
        self.ranked_on = fitting_sample(self.images, count, seed, "ranking")
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
            while not budget.met(self.shares):
                start = time.perf_counter()
                removed = self._round()
                self.seconds += time.perf_counter() - start
                self.rounds += 1
                numbers = self._look(removed)
                log.record("pruning", self.rounds, numbers)
                self._save()
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
        chosen = self._choose(groups)
        if not chosen:
            self._give_up()
        for parameter in self.student.parameters():
            parameter.grad = None  # of the old shape
        self.graph.remove(chosen)
        self.removed.append(chosen)
        self._check_runs(chosen)
        self.ranking.forget(chosen, groups)
        self._adjust()
        left = sum(group.channels for group in self.graph.groups()[0])
        self.shares = self.budget.shares(self.student, left)
        if self.budget.met(self.shares):
            self.shares = self.budget.verified(self.student, self.shares)
        return sum(len(channels) for channels in chosen.values())

    def _choose(self, groups: list[ChannelGroup]) -> dict[str, list[int]]:
        options, budget = self.options, self.budget
        # What is timed for them must be the same on every rank.
        ranked = [group for group in groups if group.name in self.open]
        scores = distributed.broadcast(self.importance(ranked))
        chunks = removable(ranked, scores, self.originals, options.limits)
        step = SelectionStep(
            chunks=chunks,
            channels=max(1, round(options.step * sum(self.originals.values()))),
            enough=budget.watch(self.student, groups, self.shares),
            shortfall=lambda: budget.needs(self.student, self.shares, options.step, chunks),
            note=self.context.log.note,
        )
        with placed("selection"):
            return options.selection(step)

    def importance(self, groups: list[ChannelGroup]) -> list[Tensor]:
        """Return the weighted sum of the criteria, (channels,) for each group."""
        options, limits = self.options, self.options.limits
        passes = options.ranking_batches * len(options.criteria)
        with self.context.log.progress("ranking", passes) as advance:
            step = PruningStep(
                model=self.student,
                teacher=self.teacher.model,
                groups=groups,
                card=self.card,
                chunks=[limits.chunks(g, self.originals[g.name]) for g in groups],
                device=self.context.device,
                batches=partial(self._batches, advance, itertools.count(1)),
                latency=self.table,
                generator=self.generator,
            )
            return self.ranking(step)

    def _batches(
        self, advance: Callable[[int], None], passed: Iterator[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device, size = self.context.device, self.options.batch_size
        all_batches = in_order(self.ranked_on, size)
        for stored, labels in itertools.islice(all_batches, self.options.ranking_batches):
            yield self.card.normalise(stored.to(device)), labels.to(device)
            advance(next(passed))

    def _adjust(self) -> None:
        """Fit the student to what it lost, or take BatchNorm's statistics; then train it."""
        options, context, teacher = self.options, self.context, self.teacher
        student, images, kept = self.student, self.images, self.cut.kept
        if options.reconstruct_each and (fit := options.reconstruction) is not None:
            reconstruct_student(teacher, student, self.cut, images, fit, context)
        else:
            how, sample, size = options.statistics, self.statistics_of, options.batch_size
            give_statistics(how, teacher, student, kept, sample, size, context)
        if options.finetune is not None:
            with placed("finetune", always=False):
                number = self.rounds + 1
                # Each pause draws other images, other crops and other pairs to mix.
                seed = derived_seed(context.seed, f"finetune {number}")
                pause = dataclasses.replace(context, seed=seed)
                stage, taught = f"finetune {number}", options.finetune
                train_student(teacher, student, images, taught, pause, stage, False, kept)

    def _check_runs(self, chosen: dict[str, list[int]]) -> None:
        try:
            check_outputs(Teacher(self.student, self.card, {}))
        except TeacherMismatch as error:
            raise NothingToPrune(
                f"{self.card.name} no longer runs once channels of {', '.join(sorted(chosen))} "
                f"are removed, so its code fixes their number: {error}"
            ) from error

    def _give_up(self) -> None:
        reached = ", ".join(
            f"{name} {self.shares[name]:.3f} (target {goal:.3f})"
            for name, goal in self.budget.goals.items()
        )
        raise NothingToPrune(
            f"the target is out of reach within the limits: {reached}. Raise limits.max_ratio, "
            "lower limits.min_channels or limits.chunk, or set an easier target",
            ("target",),
        )

    # --- records ------------------------------------------------------------------------------

    def _look(self, removed: int) -> dict[str, float]:
        """Return what a round's record holds; latency where a criterion or a goal asked for it."""
        found = {"removed_channels": float(removed), **self.shares}
        timed = self.table.asked
        found |= glance(self.student, self.teacher, self.parts, self.context, timed)
        return found

    def _save(self) -> None:
        if self.table.points:
            path = self.context.folder / RunContext.TABLE
            write_atomically(path, table_text(self.table).encode())
        tensors = prefixed("student", tensors_of(self.student))
        tensors |= prefixed("ranking", self.ranking.state())
        tensors["generator"] = self.generator.get_state()
        metrics = self.context.log.metrics
        facts = {
            "removed": self.removed,
            "seconds": self.seconds,
            "shares": self.shares,
            "teacher_ms": self.budget.teacher_ms,
            "correction": self.budget.correction,
            "training": {k: v for k, v in metrics.items() if k.startswith("training.")},
        }
        self.checkpoint.save(self.images, self.rounds, tensors, facts)

    def _restore(self, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on after the last round that an interrupted try finished."""
        self.removed = facts["removed"]
        for chosen in self.removed:
            self.graph.remove(chosen)
        load_state(self.student, below("student", state))
        self.ranking.restore(below("ranking", state))
        self.generator.set_state(state["generator"])
        self.rounds, self.seconds = facts["rounds"], facts["seconds"]
        self.context.log.metrics |= facts["training"]
        self.shares, self.budget.correction = facts["shares"], facts["correction"]
