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
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.applications.dreaming import images_for, is_own_dreams, student_folder
from dreamkit.applications.measuring import measure_cost, measure_quality
from dreamkit.applications.teaching import train_student
from dreamkit.errors import NothingToPrune, TeacherMismatch, placed
from dreamkit.evaluation.cost import count
from dreamkit.latency.lut import LookUpTable, read_table
from dreamkit.pruning.graph import ChannelGraph, Skipped
from dreamkit.pruning.selection import Limits, choose
from dreamkit.pruning.surgery import Surgery
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.store.artifact import write_artifact
from dreamkit.store.atomic import write_json
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

LUT_FILE = "latency_lut.json"
Ratio = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Target:
    """What is to be left, as shares of the teacher's; every one that is given must be met.

    Args:
        flops: of FLOPs.
        params: of parameters.
        channels: of the channels that can be pruned.
        latency: of the latency that the look-up table predicts.
    """

    flops: Ratio | None = None
    params: Ratio | None = None
    channels: Ratio | None = None
    latency: Ratio | None = None

    def __post_init__(self) -> None:
        if not self.goals:
            raise ValueError("give at least one of flops, params, channels, latency")

    @property
    def goals(self) -> dict[str, float]:
        """The shares that are given, by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def met(self, shares: dict[str, float]) -> bool:
        """Whether every goal is reached."""
        return all(shares[name] <= goal for name, goal in self.goals.items())


@dataclass(frozen=True)
class Recovery(Distillation):
    """Distillation with defaults for a network that is nearly right already."""

    temperature: Annotated[float, Field(gt=0)] = 5.0
    lr: Annotated[float, Field(gt=0)] = 0.01


@dataclass(frozen=True)
class Prune:
    """Remove the least important channels on dreams until a target, then recover by distillation.

    DeepInversion, section 4.3 and eq. 10. With a criterion that measures time, two runs of one
    seed may remove different channels; the run directory's look-up table has what was measured.

    Args:
        criteria: the weighted terms of the importance I; the lowest goes first.
        target: what is to be left.
        recovery: distillation from the teacher after pruning.
        limits: floors and chunk size.
        step: share of the prunable channels that is removed between two rankings.
        ranking_batches: batches of images a ranking is averaged over.
        batch_size: images in each of them, and in BatchNorm recalibration.
        recalibration_batches: batches that BatchNorm statistics are recomputed over after
            every step.
        normalise: ``mean`` divides each criterion by the mean of its absolute values over all
            channels, so that weights compare criteria of different units; ``none`` is eq. 10
            as it stands.
        images: what channels are ranked on; this run's own dreams by default.
    """

    criteria: Annotated[tuple[Term[Criterion], ...], TermsOf("criteria")]
    target: Target
    recovery: Recovery = Recovery()
    limits: Limits = Limits()  # noqa: RUF009
    step: Annotated[float, Field(gt=0, le=1)] = 0.05
    ranking_batches: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=2)] = 64
    recalibration_batches: Annotated[int, Field(ge=1)] = 16
    normalise: Literal["mean", "none"] = "mean"
    images: Annotated[ImageSource | None, EntryOf("sources")] = None

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("criteria: give at least one criterion")

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images)

    def run(self, context: RunContext) -> None:
        """Dream, rank and remove, recover, evaluate and save."""
        teacher = context.teacher
        student = copy.deepcopy(teacher.model)
        work = _Pruning(self, context, student)
        images = images_for(context, self.images)
        measure_quality(context, "teacher", teacher.model, None)
        start = time.perf_counter()
        work.reach_target(self._sample(images, context.seed))
        context.metrics["pruning.seconds"] = time.perf_counter() - start
        measure_quality(context, "pruned", student, images)
        with placed("recovery", always=False):
            # What is pruned depends on the latencies of the day: another try's student is another.
            train_student(context, student, images, self.recovery, "recovery", resumable=False)
        measure_quality(context, "student", student, images)
        measure_cost(context, {"teacher": teacher.model, "student": student})
        for name in ("params", "flops", "latency_ms"):
            context.metrics[f"pruned.{name}"] = context.metrics[f"student.{name}"]
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        surgery = work.surgery.to_json()
        write_artifact(student_folder(context), student, card, teacher.builder, surgery)

    def _sample(self, images: Images, seed: int) -> Images:
        """Draw what rankings and recalibration look at: image folders come sorted by class."""
        count = self.batch_size * max(self.ranking_batches, self.recalibration_batches)
        return drawn(images, count, torch.Generator().manual_seed(seed))


class _Pruning:
    """One pruning run: the student, its channel graph, and the record of what was cut."""

    def __init__(self, options: Prune, context: RunContext, student: nn.Module) -> None:
        self.options = options
        self.context = context
        self.student = student
        self.card = context.teacher.card
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        self.graph = ChannelGraph(student, self.card.input_size, self.card.num_classes)
        self.surgery = Surgery.from_json(context.teacher.surgery)
        self.table: LookUpTable = read_table(context.folder / LUT_FILE, context.latency)
        self.generator = torch.Generator().manual_seed(context.seed)
        groups, skipped = self.graph.groups()
        self.originals = {group.name: group.channels for group in groups}
        self.skipped = skipped
        context.details["pruning_skipped"] = [dataclasses.asdict(s) for s in skipped]
        self._check_any(groups)
        self.before = self._amounts(groups)

    def _check_any(self, groups: list[ChannelGroup]) -> None:
        limits = self.options.limits
        if not any(limits.spare(group.channels, group.channels) for group in groups):
            blocked = self.skipped + [
                Skipped(g.name, f"{g.channels} channels leave no spare chunk of {limits.chunk}")
                for g in groups
            ]
            listed = "".join(f"\n  {s.group}: {s.reason}" for s in blocked[:20])
            raise NothingToPrune(f"nothing of {self.card.name} can be pruned:{listed}", ("limits",))

    def reach_target(self, images: Images) -> None:
        """Rank and remove until the target is met.

        Raises:
            NothingToPrune: the limits are reached before the target.
        """
        options, log = self.options, self.context.log
        log.begin("pruning")
        most = amount = max(1, round(options.step * sum(self.originals.values())))
        shares = dict.fromkeys(self.before, 1.0)
        reached, rounds = 0.0, 0
        with log.progress("pruning", 1000) as advance:
            while not options.target.met(shares):
                removed = self._round(images, amount, shares)
                amounts = self._amounts(self.graph.groups()[0])
                shares = {name: amounts[name] / self.before[name] for name in amounts}
                before, reached = reached, self._progress(shares)
                # The last round removes about what is still missing, at this round's rate.
                missing = (1 - reached) / max(reached - before, 1e-6) * removed
                amount = max(1, min(most, round(missing)))
                rounds += 1
                log.record("pruning", rounds, {"removed_channels": removed, **shares})
                if self.table.points:
                    write_json(self.context.folder / LUT_FILE, self.table.to_json())
                advance(min(1000, round(1000 * reached)))
        for name, share in shares.items():
            self.context.metrics[f"pruned.{name}_ratio"] = share
        self.context.metrics["pruned.rounds"] = rounds

    def _round(self, images: Images, amount: int, shares: dict[str, float]) -> int:
        """Rank, remove about ``amount`` channels, recalibrate; return how many went."""
        groups, _ = self.graph.groups()
        scores = self.importance(groups, images)
        chosen = choose(groups, scores, self.originals, self.options.limits, amount)
        if not chosen:
            self._give_up(shares)
        device = self.context.device
        if device.type == "mps":
            self.student.cpu()  # the record needs float64, which MPS does not have
        with self.surgery.recorded(self.student):
            for group in groups:
                if group.name in chosen:
                    self.graph.remove(group, chosen[group.name])
        self.student.to(device)
        self._check_runs(chosen)
        self._recalibrate(images)
        return sum(len(channels) for channels in chosen.values())

    def _check_runs(self, chosen: dict[str, list[int]]) -> None:
        try:
            check_outputs(Teacher(self.student, self.card, {}))
        except TeacherMismatch as error:
            raise NothingToPrune(
                f"{self.card.name} no longer runs once channels of {', '.join(sorted(chosen))} "
                f"are removed, so its code fixes their number: {error}"
            ) from error

    def importance(self, groups: list[ChannelGroup], images: Images) -> list[Tensor]:
        """Return the weighted sum of the criteria, (channels,) for each group."""
        step = PruningStep(
            model=self.student,
            teacher=self.context.teacher.model,
            groups=groups,
            card=self.card,
            chunk=self.options.limits.chunk,
            device=self.context.device,
            batches=lambda: self._batches(images),
            latency=self.table,
            generator=self.generator,
        )
        total = [torch.zeros(group.channels) for group in groups]
        for term in self.options.criteria:
            scores = term.entry(step)
            scale = 1.0
            if self.options.normalise == "mean":
                scale = float(torch.cat(scores).abs().mean()) or 1.0
            for sum_, score in zip(total, scores, strict=True):
                sum_ += term.weight * score.cpu() / scale
        return total

    def _batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        options, device = self.options, self.context.device
        for stored, labels in itertools.islice(
            in_order(images, options.batch_size), options.ranking_batches
        ):
            yield self.card.normalise(stored.to(device)), labels.to(device)

    def _recalibrate(self, images: Images) -> None:
        options = self.options
        recalibrate(
            self.student,
            images,
            self.card,
            self.context.device,
            options.recalibration_batches,
            options.batch_size,
        )

    def _amounts(self, groups: list[ChannelGroup]) -> dict[str, float]:
        """Return FLOPs, parameters, prunable channels and, if it is a goal, predicted latency."""
        cost = count(self.student, self.card.input_size)
        channels = sum(group.channels for group in groups)
        amounts: dict[str, float] = {"channels": channels}
        amounts |= {"flops": cost.flops, "params": cost.params}
        if "latency" in self.options.target.goals:
            shapes = self.table.shapes(self.student, self.card.input_size)
            amounts["latency"] = sum(self.table.predict(shape) for shape in shapes.values())
        return amounts

    def _progress(self, shares: dict[str, float]) -> float:
        goals = self.options.target.goals
        return min((1 - shares[name]) / (1 - goal) for name, goal in goals.items())

    def _give_up(self, shares: dict[str, float]) -> None:
        reached = ", ".join(
            f"{name} {shares[name]:.3f} (target {goal})"
            for name, goal in self.options.target.goals.items()
        )
        raise NothingToPrune(
            f"the target is out of reach within the limits: {reached}. Raise limits.max_ratio, "
            "lower limits.min_channels or limits.chunk, or set an easier target",
            ("target",),
        )
