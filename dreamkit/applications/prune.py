"""Data-free, hardware-aware structured pruning.

DeepInversion (Yin et al., CVPR 2020), section 4.3: channels are ranked on dreams by
I = I_err + η·I_lat (eq. 10), removed step by step, and the network recovers by distillation.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamkit import distributed
from dreamkit.errors import (
    MissingPath,
    NothingToPrune,
    OptionError,
    TeacherMismatch,
    placed,
)
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.flat_state import below, prefixed
from dreamkit.latency.lut import LookUpTable, read_table
from dreamkit.model_state import load_state
from dreamkit.pruning.graph import ChannelGraph, Skipped
from dreamkit.pruning.knapsack import choose_knapsack
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import Limits, choose, removable
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.stages.adaptive import Adaptive, Taught
from dreamkit.stages.budget import TOLERANCE, Budget, Target
from dreamkit.stages.dreaming import student_folder
from dreamkit.stages.measuring import measure_cost, measure_quality, time_models
from dreamkit.stages.pruning_checkpoint import PruningCheckpoint
from dreamkit.stages.ranking import Normalise, Ranking
from dreamkit.stages.reconstructing import Reconstruction, reconstruct_student
from dreamkit.stages.teaching import first_images, go_on_with, train_student
from dreamkit.store.artifact import write_artifact
from dreamkit.store.atomic import write_atomically
from dreamkit.teachers.checking import check_outputs
from dreamkit.training.batches import drawn, in_order
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.training.distillation import Distillation
from dreamkit.types import (
    ChannelGroup,
    Criterion,
    Images,
    ImageSource,
    PruningStep,
    RunContext,
    Teacher,
)

EVALUATED = 2048
"""Evaluation images that are looked at after every round."""
SEEDS_OF_A_PAUSE = 1000
"""How far the seeds of two trainings of a run lie apart: more than one training uses."""


@dataclass(frozen=True)
class Recovery(Distillation):
    """Distillation with defaults for a network that is nearly right already."""

    temperature: Annotated[float, Field(gt=0)] = 5.0
    lr: Annotated[float, Field(gt=0)] = 0.01


@dataclass(frozen=True)
class Prune(Taught):
    """Remove the least important channels on dreams until a target, then recover by distillation.

    DeepInversion, section 4.3 and eq. 10. With a criterion that measures time, two runs of one
    seed may remove different channels; the run directory's look-up table has what was measured.

    Args:
        criteria: the weighted terms of the importance I; the lowest goes first.
        target: what is to be left.
        recovery: distillation from the teacher after pruning.
        reconstruction: least squares, layer by layer, between what is left and the teacher, before
            the recovery; null leaves the weights as they are until then.
        reconstruct_each: do that in every round, before ``finetune``, so that channels are ranked
            on what the network has become without those that went. It makes anew what the last
            ``finetune`` taught, of which the ranking remains.
        finetune: distillation between two rounds of pruning, with ``adaptive`` on the first of its
            dreams; null prunes without a pause.
        limits: floors and chunk size.
        selection: how channels are chosen: ``greedy``, the lowest importance first (the paper),
            or ``knapsack``, the least importance that saves what a round has to (HALP; Shen et
            al., NeurIPS 2022).
        step: what is removed between two rankings at the most, a share of the prunable channels
            (``greedy``) or of what each goal counts (``knapsack``).
        ranking_batches: batches of images a ranking is averaged over.
        batch_size: images in each of them, and in BatchNorm recalibration.
        recalibration_batches: batches that BatchNorm statistics are recomputed over after
            every step.
        normalise: what each criterion's values are divided by, so that weights compare criteria
            of different units: the ``mean`` or the ``max`` of their absolute values over all
            channels, the mean within each ``group`` (for criteria whose size differs from layer
            to layer), or ``none``, which is eq. 10 as it stands.
        images: what channels are ranked on; this run's own dreams by default.
        adaptive: dream while the pruned network recovers, against it (Adaptive DeepInversion, with
            the regularizer ``js_compete``); null dreams everything first. The first of these
            dreams are made before pruning, and channels are ranked on them.
        latency_table: a table that ``dreamkit lut build`` measured on this target; what it lacks
            is measured during the run.
    """

    criteria: Annotated[tuple[Term[Criterion], ...], TermsOf("criteria")]
    target: Target
    recovery: Recovery = field(default_factory=Recovery)
    reconstruction: Reconstruction | None = None
    reconstruct_each: bool = False
    finetune: Recovery | None = None
    limits: Limits = field(default_factory=Limits)
    selection: Literal["greedy", "knapsack"] = "greedy"
    step: Annotated[float, Field(gt=0, le=1)] = 0.05
    ranking_batches: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=2)] = 64
    recalibration_batches: Annotated[int, Field(ge=1)] = 16
    normalise: Normalise = "mean"
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None
    latency_table: str | None = None

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("criteria: give at least one criterion")
        if self.reconstruction is None and self.reconstruct_each:
            raise OptionError("reconstruct_each", "set 'reconstruction' too: it says how")
        if self.reconstruction and self.finetune and not self.reconstruct_each:
            raise OptionError(
                "reconstruct_each",
                "set it to true: a fit at the end alone would undo all that 'finetune' taught",
            )
        if self.latency_table is not None and not Path(self.latency_table).is_file():
            raise MissingPath("latency_table", f"no such table: {self.latency_table}")
        self.check_adaptive()

    def make_student(self, context: RunContext) -> Teacher:
        """Return a copy of the teacher: what is to be pruned, and what competes at first."""
        return dataclasses.replace(context.teacher, model=copy.deepcopy(context.teacher.model))

    def run(self, context: RunContext) -> None:
        """Dream, rank and remove, recover, evaluate and save."""
        teacher = context.teacher
        work = _Pruning(self, context)
        # A copy of the teacher agrees with it: the first dreams against it are DeepInversion's.
        copied = self.make_student(context).model
        images = first_images(
            context, self.images, self.adaptive, copied, self.recovery, "recovery"
        )
        measure_quality(context, "teacher", teacher.model, None)
        work.begin(images)
        work.reach_target()
        student = work.student
        if self.reconstruction is not None and not self.reconstruct_each:
            measure_quality(context, "cut", student, images)
            reconstruct_student(context, student, work.cut, images, self.reconstruction)
        measure_quality(context, "pruned", student, images)
        images = go_on_with(context, student, images, self.adaptive, self.recovery, "recovery")
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        for name in ("params", "flops", "latency_ms"):
            context.metrics[f"pruned.{name}"] = context.metrics[f"student.{name}"]
        work.judge_latency()
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        pruning_record = work.cut.after(PruningRecord.from_json(teacher.pruning_record)).to_json()
        write_artifact(student_folder(context), student, card, teacher.builder, pruning_record)


class _Pruning:
    """One pruning run: the student, its channel graph, and the record of what was cut."""

    def __init__(self, options: Prune, context: RunContext) -> None:
        self.options = options
        self.context = context
        self.card = context.teacher.card
        self.student = copy.deepcopy(context.teacher.model)
        self.cut = PruningRecord()
        self.ranking = Ranking(options.criteria, options.normalise)
        self.generator = torch.Generator().manual_seed(context.seed)
        self.removed: list[dict[str, list[int]]] = []
        self.rounds = 0
        self.seconds = 0.0
        self.table: LookUpTable = read_table(context.folder / context.TABLE, context.latency)
        if options.latency_table is not None:
            with placed("latency_table"):
                known = read_table(Path(options.latency_table), context.latency, strict=True)
            self.table.points = known.points | self.table.points
        for parameter in self.student.parameters():
            parameter.requires_grad_(True)
        self.graph = ChannelGraph(self.student, self.card.input_size, self.cut)
        groups, skipped = self.graph.groups()
        with placed("limits"):
            options.limits.check([*self.graph.makers, *(s.group for s in skipped)])
        context.details["pruning_skipped"] = [dataclasses.asdict(s) for s in skipped]
        self.originals = {group.name: group.channels for group in groups}
        limits = options.limits
        self.open = {group.name for group in groups if limits.chunks(group, group.channels)}
        """Groups that the limits do not leave alone from the start; these are ranked."""
        self._check_any(groups, skipped)
        self.ranking.check(self.student, [group for group in groups if group.name in self.open])
        self.checkpoint = PruningCheckpoint(context)
        found = self.checkpoint.found
        teacher_ms = None if found is None else found[1]["teacher_ms"]
        channels = sum(self.originals.values())
        self.budget = Budget(options.target, context, self.table, channels, teacher_ms)
        self.shares = dict.fromkeys(self.budget.before, 1.0)

    def begin(self, images: Images) -> None:
        """Take the images that channels are ranked on; go on from a checkpoint if there is one."""
        options, context = self.options, self.context
        self.images = images
        count = options.batch_size * max(options.ranking_batches, options.recalibration_batches)
        # Drawn: image folders come sorted by class.
        self.sample = drawn(images, count, torch.Generator().manual_seed(context.seed))
        self.evaluated: Images | None = None
        if context.evaluation is not None:
            draws = torch.Generator().manual_seed(context.seed)
            self.evaluated = drawn(context.evaluation, EVALUATED, draws)
        found = self.checkpoint.go_on(images)
        if found is not None:
            self._restore(*found)

    def _check_any(self, groups: list[ChannelGroup], skipped: list[Skipped]) -> None:
        if not self.open:
            chunk = self.options.limits.chunk
            blocked = skipped + [
                Skipped(g.name, f"{g.channels} channels leave no spare chunk of {chunk}")
                for g in groups
            ]
            listed = "".join(f"\n  {s.group}: {s.reason}" for s in blocked[:20])
            raise NothingToPrune(f"nothing of {self.card.name} can be pruned:{listed}", ("limits",))

    # --- rounds -------------------------------------------------------------------------------

    def reach_target(self) -> None:
        """Rank and remove until the target is met.

        Raises:
            NothingToPrune: the limits are reached before the target.
        """
        context, budget = self.context, self.budget
        with context.log.progress("pruning", 1000) as advance:
            while not budget.met(self.shares):
                start = time.perf_counter()
                removed = self._round()
                self.seconds += time.perf_counter() - start
                self.rounds += 1
                context.log.record("pruning", self.rounds, self._look(removed))
                if self.table.points:
                    write_atomically(context.folder / context.TABLE, self.table.to_text().encode())
                self._save()
                context.log.check(together=True)
                advance(max(0, min(1000, round(1000 * budget.progress(self.shares)))))
        context.metrics["pruning.seconds"] = self.seconds
        context.metrics["pruned.rounds"] = self.rounds
        for name, share in self.shares.items():
            context.metrics[f"pruned.{name}_ratio"] = share

    def _round(self) -> int:
        """Rank, remove, recalibrate, perhaps recover; return how many channels went."""
        options, context = self.options, self.context
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
        if options.reconstruct_each and (fit := options.reconstruction) is not None:
            reconstruct_student(context, self.student, self.cut, self.images, fit)
        else:
            batches, size = options.recalibration_batches, options.batch_size
            recalibrate(self.student, self.sample, self.card, context.device, batches, size)
        if options.finetune is not None:
            with placed("finetune", always=False):
                number = self.rounds + 1
                # Each pause draws other images, other crops and other pairs to mix.
                pause = dataclasses.replace(context, seed=context.seed + SEEDS_OF_A_PAUSE * number)
                stage = f"finetune {number}"
                train_student(pause, self.student, self.images, options.finetune, stage, False)
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
        if options.selection == "knapsack":
            needs = budget.needs(self.student, self.shares, options.step, chunks)
            with placed("selection"):
                return choose_knapsack(chunks, needs, self.context.log.note) or {}
        most = max(1, round(options.step * sum(self.originals.values())))
        return choose(chunks, most, budget.watch(self.student, groups, self.shares))

    def importance(self, groups: list[ChannelGroup]) -> list[Tensor]:
        """Return the weighted sum of the criteria, (channels,) for each group."""
        limits = self.options.limits
        step = PruningStep(
            model=self.student,
            teacher=self.context.teacher.model,
            groups=groups,
            card=self.card,
            chunks=[limits.chunks(g, self.originals[g.name]) for g in groups],
            device=self.context.device,
            batches=self._batches,
            latency=self.table,
            generator=self.generator,
        )
        return self.ranking(step)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        options, device = self.options, self.context.device
        for stored, labels in itertools.islice(
            in_order(self.sample, options.batch_size), options.ranking_batches
        ):
            yield self.card.normalise(stored.to(device)), labels.to(device)

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
        """Return what a round's record holds."""
        found = {"removed_channels": float(removed), **self.shares}
        if self.evaluated is not None:
            device = self.context.device
            found["accuracy"] = accuracy(self.student, self.evaluated, self.card, device)
        timings = time_models(self.context, {"student": self.student})
        found["latency_ms"] = timings["student"].median_ms
        return found

    def judge_latency(self) -> None:
        """Say so if the finished student misses its latency budget."""
        metrics, goals = self.context.metrics, self.budget.goals
        if "latency" not in goals:
            return
        budget = self.budget.latency_ms(metrics["teacher.latency_ms"])
        metrics["student.latency_budget_ms"] = budget
        if metrics["student.latency_ms"] > (1 + TOLERANCE) * budget:
            self.context.failures.append(
                f"the student takes {metrics['student.latency_ms']:.3f} ms and was to take "
                f"{budget:.3f} ms; its latency was within the budget when pruning ended, so "
                "either the machine was busy or timings of this length vary by more than "
                f"{TOLERANCE:.0%} here"
            )

    def _save(self) -> None:
        tensors = prefixed("student", self.student.state_dict())
        tensors |= prefixed("ranking", self.ranking.state())
        tensors["generator"] = self.generator.get_state()
        facts = {
            "removed": self.removed,
            "seconds": self.seconds,
            "shares": self.shares,
            "teacher_ms": self.budget.teacher_ms,
            "correction": self.budget.correction,
            "training": {
                k: v for k, v in self.context.metrics.items() if k.startswith("training.")
            },
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
        self.context.metrics |= facts["training"]
        self.shares, self.budget.correction = facts["shares"], facts["correction"]
