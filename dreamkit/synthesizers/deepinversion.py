"""DeepInversion: optimise noise until the teacher classifies it and knows its statistics.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.
Which regularizers stand in the recipe makes it Noise (none), DeepDream (tv, l2), DeepInversion
(+ bn_feature) or Adaptive DeepInversion (+ js_compete).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, TeacherMismatch, placed
from dreamkit.model_state import frozen
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.synthesizers.bn_statistics import BatchNormTap, batch_norm_layers, tapped
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import (
    BatchPlan,
    Dream,
    InversionStep,
    OnStep,
    Regularizer,
    Teacher,
    TeacherSource,
    needs,
)

Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Stage:
    """One resolution of an inversion.

    Args:
        steps: optimizer steps.
        size: side of a square, or [height, width]; null is the teacher's input size.
        lr: learning rate of this stage; null is the synthesizer's.
    """

    steps: Annotated[int, Field(ge=1)]
    size: Size | tuple[Size, Size] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None

    def resolution(self, card: Card) -> tuple[int, int]:
        """Return (height, width)."""
        if self.size is None:
            return card.input_size[1:]
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True)
class DeepInversion:
    """DeepInversion and its ladder: cross-entropy to a label plus weighted regularizers.

    Yin et al., CVPR 2020, eq. 2 to 9. Images are optimised by Adam in normalised space from
    N(0, 1); the best ones of the last stage are kept, by the whole batch's loss.

    Args:
        images: how many to dream.
        regularizers: the weighted terms of R(x̂).
        stages: resolutions in turn, joined by nearest upsampling; the last one's size is the
            images' size.
        batch_size: images optimised together, over which feature statistics are taken.
        lr: Adam's learning rate.
        betas: Adam's.
        schedule: of the learning rate within a stage.
        warmup: steps over which the learning rate rises from 0 at the start of a stage.
        jitter: largest random shift in pixels at the last stage's size, scaled in the others;
            null is a sixteenth of the side (2 at 32×32).
        flip: mirror the batch left to right in half of the steps; wrong for digits and text.
        clip: keep pixels in the valid range after every step.
        labels: ``balanced`` deals the classes out in turn, ``random`` draws them, and a list of
            classes is dealt out in turn.
        student: the competitor of ``js_compete``.
    """

    images: Annotated[int, Field(ge=1)]
    regularizers: Annotated[tuple[Term[Regularizer], ...], TermsOf("regularizers")]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (Stage(2000),)
    batch_size: Annotated[int, Field(ge=1)] = 256
    lr: Annotated[float, Field(gt=0)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    jitter: Annotated[int, Field(ge=0)] | None = None
    flip: bool = False
    clip: bool = False
    labels: Literal["balanced", "random"] | Annotated[tuple[int, ...], Field(min_length=1)] = (
        "balanced"
    )
    student: Annotated[TeacherSource | None, EntryOf("teachers")] = None

    def __post_init__(self) -> None:
        competing = [t.name for t in self.regularizers if "student_logits" in needs(t.entry)]
        if competing and self.student is None:
            raise OptionError("regularizers", f"{competing[0]} needs the option 'student'")

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    def label_plan(self, plan: BatchPlan, num_classes: int, generator: torch.Generator) -> Tensor:
        """Return a batch's labels (N,); those dealt in turn go on from the batch before."""
        if self.labels == "random":
            return torch.randint(num_classes, (plan.size,), generator=generator)
        classes = (
            torch.arange(num_classes) if self.labels == "balanced" else torch.tensor(self.labels)
        )
        turn = torch.arange(plan.first_image, plan.first_image + plan.size)
        return classes[turn % len(classes)]

    @contextmanager
    def session(self, teacher: Teacher, device: torch.device) -> Iterator[Inversion]:
        """Freeze the teacher and tap its statistics; on leaving it is as it was."""
        self._check_terms(teacher)
        student = self._load_student(teacher)
        with ExitStack() as stack:
            stack.enter_context(frozen(teacher.model))
            if student is not None:
                stack.enter_context(frozen(student.to(device)))
            tap = None
            if "bn_statistics" in self._needed:
                tap = stack.enter_context(tapped(teacher.model))
            yield Inversion(self, teacher, student, tap, device)

    @property
    def _needed(self) -> frozenset[str]:
        return frozenset().union(*(needs(term.entry) for term in self.regularizers))

    def _load_student(self, teacher: Teacher) -> nn.Module | None:
        if self.student is None or "student_logits" not in self._needed:
            return None
        with placed("student"):
            student = self.student.load(seed=0)
            check_outputs(student)
            ours, theirs = student.card, teacher.card
            if (ours.num_classes, ours.input_size) != (theirs.num_classes, theirs.input_size):
                raise TeacherMismatch(
                    f"{ours.name} takes {ours.input_size} and has {ours.num_classes} outputs; the "
                    f"teacher takes {theirs.input_size} and has {theirs.num_classes}"
                )
        return student.model

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that the terms, the labels or the student do not fit."""
        self._check_terms(teacher)
        self._load_student(teacher)

    def _check_terms(self, teacher: Teacher) -> None:
        for index, term in enumerate(self.regularizers):
            if "bn_statistics" in needs(term.entry) and not batch_norm_layers(teacher.model):
                raise TeacherMismatch(
                    f"{term.name} matches BatchNorm statistics, and {teacher.card.name} has no "
                    "BatchNorm layer. Choose a teacher that has (a ResNet, say), leave the term "
                    "out (DeepDream: tv and l2), or train on proxy images "
                    "({source: folder, path: ...})",
                    ("regularizers", index),
                )
        if not isinstance(self.labels, str):
            wrong = [label for label in self.labels if not 0 <= label < teacher.card.num_classes]
            if wrong:
                raise TeacherMismatch(
                    f"label {wrong[0]} is none of the teacher's {teacher.card.num_classes} classes "
                    f"(0 to {teacher.card.num_classes - 1})",
                    ("labels",),
                )


@dataclass(frozen=True)
class Inversion:
    """DeepInversion bound to a frozen teacher on a device."""

    options: DeepInversion
    teacher: Teacher
    student: nn.Module | None
    tap: BatchNormTap | None
    device: torch.device

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Optimise one batch through every stage."""
        options, card = self.options, self.teacher.card
        generator = torch.Generator().manual_seed(plan.seed)
        labels = options.label_plan(plan, card.num_classes, generator).to(self.device)
        size = options.stages[0].resolution(card)
        noise = torch.randn(plan.size, card.input_size[0], *size, generator=generator)
        images, loss, done = noise.to(self.device), torch.tensor(math.inf), 0
        for stage in options.stages:
            images = F.interpolate(images, size=stage.resolution(card), mode="nearest")
            images, loss = self._stage(images, labels, stage, generator, done, on_step)
            done += stage.steps
        if not math.isfinite(loss):
            raise DreamkitError(
                f"the loss of batch {plan.index} was never finite: lower the learning rate or the "
                "weights of the regularizers"
            )
        return Dream(images, labels, float(loss))

    def _stage(
        self,
        start: Tensor,
        labels: Tensor,
        stage: Stage,
        generator: torch.Generator,
        done: int,
        on_step: OnStep,
    ) -> tuple[Tensor, Tensor]:
        """Optimise at one resolution; return the best images and their loss."""
        options = self.options
        low, high = self.teacher.card.pixel_range(start)
        if options.clip:
            start = start.clamp(low, high)
        images = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=stage.lr or options.lr, betas=options.betas)
        shift = self._jitter(stage)
        best, best_loss = start.clone(), torch.tensor(math.inf, device=self.device)
        for step in range(stage.steps):
            factor = learning_rate_factor(step, stage.steps, options.schedule, options.warmup)
            optimizer.param_groups[0]["lr"] = (stage.lr or options.lr) * factor
            before = images.detach().clone()
            terms = self.terms(augment(images, shift, options.flip, generator), labels)
            loss = torch.stack(list(terms.values())).sum()
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            if options.clip:
                with torch.no_grad():
                    images.copy_(images.clamp(low, high))
            # The loss is of the images before the step; both are chosen without a host sync.
            better = loss.detach() < best_loss
            best = torch.where(better, before, best)
            best_loss = torch.where(better, loss.detach(), best_loss)
            detached = {name: value.detach() for name, value in terms.items()}
            on_step(done + step + 1, {"loss": loss.detach(), **detached})
        return best, best_loss

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss on images as the teacher sees them."""
        if self.tap is not None:
            logits, statistics = self.tap(images)
        else:
            logits, statistics = self.teacher.model(images), ()
        step = InversionStep(
            images=images,
            labels=labels,
            teacher_logits=logits,
            student_logits=self.student(images) if self.student is not None else None,
            bn_statistics=statistics,
        )
        terms = {"cross_entropy": F.cross_entropy(logits, labels)}
        for term in self.options.regularizers:
            value = term.weight * term.entry(step)
            # A name may stand in the recipe more than once; its values add up.
            terms[term.name] = terms[term.name] + value if term.name in terms else value
        return terms

    def _jitter(self, stage: Stage) -> tuple[int, int]:
        card = self.teacher.card
        height, width = stage.resolution(card)
        if self.options.jitter is None:
            return height // 16, width // 16
        last_height, last_width = self.options.stages[-1].resolution(card)
        jitter = self.options.jitter
        return round(jitter * height / last_height), round(jitter * width / last_width)


def augment(
    images: Tensor, shift: tuple[int, int], flip: bool, generator: torch.Generator
) -> Tensor:
    """Roll a batch by up to ``shift`` pixels each way, and mirror it in half of the cases."""
    draw: Any = [torch.randint(-s, s + 1, (), generator=generator).item() for s in shift]
    if any(draw):
        images = torch.roll(images, shifts=draw, dims=(2, 3))
    if flip and torch.rand((), generator=generator).item() < 0.5:
        images = images.flip(3)
    return images


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """Return the factor on the learning rate at a step of a stage."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return rise
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * progress))
