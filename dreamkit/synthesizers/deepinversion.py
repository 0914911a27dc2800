"""DeepInversion: optimise noise until the teacher classifies it and knows its statistics.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.
Which regularizers stand in the recipe makes it Noise (none), DeepDream (tv, l2), DeepInversion
(+ bn_feature) or Adaptive DeepInversion (+ js_compete).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.errors import NonFiniteLoss, OptionError, TeacherMismatch, placed
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.synthesizers.bn_statistics import BatchNormTap, batch_norm_layers, tapped
from dreamkit.synthesizers.engine import (
    EXPECTED_SPEEDUP,
    Engine,
    Evaluator,
    borrowed,
    compile_seconds,
)
from dreamkit.synthesizers.memory import largest_batch, peak_memory
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import (
    BatchPlan,
    Dream,
    Estimate,
    InversionStep,
    LayerStatistics,
    OnStep,
    Parameterisation,
    Regularizer,
    Teacher,
    TeacherSource,
    needs,
)

Size = Annotated[int, Field(ge=1)]

SYNC_EVERY = 25
"""Steps between looks at whether the loss is finite and falls; each look waits for the device."""
PROGRESS = 1e-3
"""Relative fall of the best loss that counts as progress."""
LARGEST_BATCH = 1024
"""What ``batch_size: auto`` does not go beyond: a batch is what an interruption loses."""
TIMED_SECONDS = 1.0
"""How long the steps of a stage are timed for, or until 20 are done."""


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
        batch_size: images optimised together, over which feature statistics are taken. ``auto``
            is the most that fit, up to 1,024: on a CPU in 60 % of the memory available then, on a
            GPU by trial.
        lr: Adam's learning rate.
        betas: Adam's.
        schedule: of the learning rate within a stage.
        warmup: steps over which the learning rate rises from 0 at the start of a stage.
        jitter: largest random shift in pixels at the last stage's size, scaled in the others;
            null is a sixteenth of the side (2 at 32×32).
        flip: mirror the batch left to right in half of the steps; wrong for digits and text.
        clip: keep pixels in the valid range after every step.
        parameterisation: what the optimizer moves.
        patience: end a stage after this many steps in which its best loss fell by less than a
            thousandth; looked at every 25 steps. Null never does.
        labels: ``balanced`` deals the classes out in turn, ``random`` draws them, and a list of
            classes is dealt out in turn.
        student: the competitor of ``js_compete``.
        engine: how it is computed.
    """

    images: Annotated[int, Field(ge=1)]
    regularizers: Annotated[tuple[Term[Regularizer], ...], TermsOf("regularizers")]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (Stage(2000),)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 256
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
    parameterisation: Annotated[Parameterisation, EntryOf("parameterisations")] = field(
        default_factory=Pixels
    )
    patience: Annotated[int, Field(ge=1)] | None = None
    labels: Literal["balanced", "random"] | Annotated[tuple[int, ...], Field(min_length=1)] = (
        "balanced"
    )
    student: Annotated[TeacherSource | None, EntryOf("teachers")] = None
    engine: Engine = field(default_factory=Engine)

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
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Iterator[Inversion]:
        """Freeze the teacher and tap its statistics; on leaving it is as it was."""
        self._check_terms(teacher)
        student = self._load_student(teacher)
        with ExitStack() as stack:
            stack.enter_context(borrowed(teacher.model))
            if student is not None:
                stack.enter_context(borrowed(student.to(device)))
            tap = None
            if "bn_statistics" in self._needed:
                tap = stack.enter_context(tapped(teacher.model))
            inversion = Inversion(self, teacher, student, tap, device, choices or {}, note)
            stack.callback(inversion.evaluator.discard_compiled)
            yield inversion

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


class Inversion:
    """DeepInversion bound to a frozen teacher on a device.

    Args:
        options: the recipe's.
        teacher: frozen, on ``device``.
        student: the competitor, frozen, on ``device``.
        tap: of the teacher, where a term needs its statistics.
        device: where to work.
        choices: what an earlier session settled.
        note: told what the user must know.
    """

    def __init__(
        self,
        options: DeepInversion,
        teacher: Teacher,
        student: nn.Module | None,
        tap: BatchNormTap | None,
        device: torch.device,
        choices: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.student = student
        self.tap = tap
        self.device = device
        self.note = note
        settled = {"precision": options.engine.precision, "compile": options.engine.compile}
        self.engine = Engine(**(settled | {k: choices[k] for k in settled if k in choices}))
        self.evaluator = self.engine.evaluator(self.terms, device)
        batch_size = choices.get("batch_size", options.batch_size)
        self._batch_size = self._largest_batch() if batch_size == "auto" else batch_size

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""
        return self._batch_size

    @property
    def choices(self) -> dict[str, Any]:
        """The batch size and how the engine computes; plain data."""
        return {
            "batch_size": self.batch_size,
            "precision": self.evaluator.precision,
            "compile": self.engine.compile is True,
        }

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Optimise one batch through every stage.

        A batch whose loss overflows starts once more from its seed, in float32.

        Raises:
            NonFiniteLoss: it overflowed there too.
        """
        if self.evaluator.exact:
            return self._dream(plan, self.evaluator, on_step)
        try:
            return self._dream(plan, self.evaluator, on_step)
        except NonFiniteLoss as error:
            self.note(f"{error.message}; once more in float32")
        exact = Engine(precision="float32", compile=False).evaluator(self.terms, self.device)
        return self._dream(plan, exact, on_step)

    def _dream(self, plan: BatchPlan, evaluator: Evaluator, on_step: OnStep) -> Dream:
        options, card = self.options, self.teacher.card
        generator = torch.Generator().manual_seed(plan.seed)
        labels = options.label_plan(plan, card.num_classes, generator).to(self.device)
        images, loss, done = None, torch.tensor(math.inf), 0
        for stage in options.stages:
            size = stage.resolution(card)
            if images is None:
                shape = (plan.size, card.input_size[0], *size)
                start = options.parameterisation.start(shape, generator).to(self.device)
            else:
                images = F.interpolate(images, size=size, mode="nearest")
                start = options.parameterisation.encode(images)

            def counted(step: int, terms: Mapping[str, Tensor], done: int = done) -> None:
                on_step(done + step, terms)

            found = self._stage(start, labels, stage, generator, evaluator, counted)
            if found is None:
                raise NonFiniteLoss(
                    f"the loss of batch {plan.index} is not finite: lower the learning rate or "
                    "the weights of the regularizers"
                )
            images, loss = found
            done += stage.steps
        assert images is not None
        return Dream(images, labels, float(loss))

    def _stage(
        self,
        parameters: Tensor,
        labels: Tensor,
        stage: Stage,
        generator: torch.Generator,
        evaluator: Evaluator,
        on_step: OnStep,
    ) -> tuple[Tensor, Tensor] | None:
        """Optimise at one resolution; return the best images and their loss, if it was finite."""
        options, size = self.options, stage.resolution(self.teacher.card)
        limits = self.teacher.card.pixel_range(parameters) if options.clip else None
        parameters = self._clipped(parameters, size, limits).contiguous().requires_grad_()
        optimizer = torch.optim.Adam(
            [parameters],
            lr=stage.lr or options.lr,
            betas=options.betas,
            fused=self.device.type in {"cpu", "cuda"},
        )
        draws = draw_views(stage.steps, self._jitter(stage), options.flip, generator)
        draws = draws.to(self.device)
        best, best_loss = parameters.detach().clone(), torch.tensor(math.inf, device=self.device)
        finite = torch.tensor(True, device=self.device)
        plateau = Plateau(options.patience)
        for step in range(stage.steps):
            factor = learning_rate_factor(step, stage.steps, options.schedule, options.warmup)
            optimizer.param_groups[0]["lr"] = (stage.lr or options.lr) * factor
            images = options.parameterisation.render(parameters, size)
            found = evaluator(images, labels, draws[step])
            (gradient,) = torch.autograd.grad(images, [parameters], found.gradient)
            # Fused Adam pairs values by their place in memory, whatever the strides say.
            parameters.grad = gradient.contiguous()
            # The loss is of the parameters before the step; the choice needs no host sync.
            better = found.loss < best_loss
            best = torch.where(better, parameters.detach(), best)
            best_loss = torch.where(better, found.loss, best_loss)
            finite &= torch.isfinite(found.loss)
            optimizer.step()
            if limits is not None:
                with torch.no_grad():
                    parameters.copy_(self._clipped(parameters, size, limits))
            on_step(step + 1, {"loss": found.loss, **found.terms})
            if (step + 1) % SYNC_EVERY == 0 and (not finite or plateau(step + 1, best_loss)):
                break
        if not finite:
            return None
        return options.parameterisation.render(best, size), best_loss

    def _clipped(
        self, parameters: Tensor, size: tuple[int, int], limits: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the parameters of the images with their pixels within limits, if there are."""
        if limits is None:
            return parameters.detach()
        with torch.no_grad():
            images = self.options.parameterisation.render(parameters, size)
            return self.options.parameterisation.encode(images.clamp(*limits))

    def terms(
        self, images: Tensor, labels: Tensor, arithmetic: AbstractContextManager[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss on images as the teacher sees them.

        Args:
            images: (N, C, H, W), normalised.
            labels: (N,).
            arithmetic: sets the networks' precision.
        """
        student_logits: Tensor | None = None
        statistics: tuple[LayerStatistics, ...] = ()
        with arithmetic or nullcontext():
            if self.tap is not None:
                logits, statistics = self.tap(images)
            else:
                logits = self.teacher.model(images)
            if self.student is not None:
                student_logits = self.student(images).float()
        step = InversionStep(images, labels, logits.float(), student_logits, statistics)
        terms = {"cross_entropy": F.cross_entropy(step.teacher_logits, labels)}
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

    # --- planning ---------------------------------------------------------------------------

    def _largest_batch(self) -> int:
        card = self.teacher.card
        sizes = [stage.resolution(card) for stage in self.options.stages]
        largest = max(sizes, key=math.prod)

        def trial(size: int) -> None:
            images = torch.zeros(size, card.input_size[0], *largest, device=self.device)
            labels = torch.zeros(size, dtype=torch.int64, device=self.device)
            self.evaluator(images, labels, torch.zeros(3, dtype=torch.int64, device=self.device))

        found = largest_batch(trial, min(self.options.images, LARGEST_BATCH), self.device)
        self.note(f"batch_size: auto is {found} on this machine")
        return found

    def prepare(self, images: int) -> Estimate:
        """Time a few steps of every stage, compile if that pays, and estimate the cost.

        Args:
            images: how many are to be dreamed.

        Returns:
            Seconds for all of them, compilation included; peak memory of a step.
        """
        batches = images / self.batch_size
        stages = self.options.stages
        with peak_memory(self.device) as peak:
            eager = self._seconds_a_batch([self._seconds_a_step(stage) for stage in stages])
        estimate = Estimate(batches * eager, peak.total)
        chosen_here = self.engine.compile == "auto"
        if chosen_here:
            self._decide_on_compiling(estimate.seconds)
        if self.engine.compile is not True:
            return estimate
        start = time.perf_counter()
        problem, compiled = self.compile(), eager
        spent = time.perf_counter() - start
        if problem is None:
            with peak_memory(self.device) as peak:
                compiled = self._seconds_a_batch([self._seconds_a_step(stage) for stage in stages])
            if chosen_here and compiled > eager:
                problem = "compiled, it is slower"
        if problem is not None:
            self.evaluator.discard_compiled()
            self.engine = replace(self.engine, compile=False)
            self.note(f"inversion runs without compilation: {problem}")
            return estimate
        self.note(f"inversion compiled in {spent:.0f} s: {eager / compiled:.1f} times as fast")
        return Estimate(spent + batches * compiled, peak.total)

    def _decide_on_compiling(self, seconds: float) -> None:
        sizes = {stage.resolution(self.teacher.card) for stage in self.options.stages}
        cost = len(sizes) * compile_seconds(self.teacher.model)
        saved = seconds * (1 - 1 / EXPECTED_SPEEDUP)
        self.engine = replace(self.engine, compile=saved > cost)
        if saved <= cost:
            self.note(
                f"inversion runs without compilation: compiling takes about {cost:.0f} s and "
                f"would save about {saved:.0f} s"
            )

    def _seconds_a_batch(self, seconds_a_step: Sequence[float]) -> float:
        stages = self.options.stages
        return sum(s.steps * t for s, t in zip(stages, seconds_a_step, strict=True))

    def _seconds_a_step(self, stage: Stage) -> float:
        """Take a few steps of a stage, throw them away, and return what one takes."""
        start, labels, generator = self._sample(stage)
        clock = StepClock(self.device)
        sample = replace(stage, steps=clock.most_steps)
        with suppress(TimedEnough):
            self._stage(start, labels, sample, generator, self.evaluator, clock)
        return clock.seconds

    def compile(self) -> str | None:
        """Compile for full batches of every stage; return why that did not work, if so."""
        for stage in self.options.stages:
            start, labels, _ = self._sample(stage)
            size = stage.resolution(self.teacher.card)
            images = self.options.parameterisation.render(start, size)
            problem = self.evaluator.compile(images, labels)
            if problem is not None:
                return problem
        return None

    def _sample(self, stage: Stage) -> tuple[Tensor, Tensor, torch.Generator]:
        """Return what a full batch may start a stage from."""
        card, generator = self.teacher.card, torch.Generator().manual_seed(0)
        size = min(self.batch_size, self.options.images)
        shape = (size, card.input_size[0], *stage.resolution(card))
        start = self.options.parameterisation.start(shape, generator).to(self.device)
        labels = self.options.label_plan(BatchPlan(0, 0, size, 0), card.num_classes, generator)
        return start, labels.to(self.device), generator


class TimedEnough(Exception):
    """Ends a stage that is only run for the time that it takes."""


class StepClock:
    """Times the steps of a stage, as its ``on_step``, without the first ones.

    Those also load kernels and, compiled on a GPU, record graphs.

    Args:
        device: waited for after every step.
    """

    most_steps = 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_steps = 1 if device.type == "cpu" else 4
        self.times: list[float] = []

    def __call__(self, done: int, terms: Mapping[str, Tensor]) -> None:
        """Note the time; raise ``TimedEnough`` once there is enough of it."""
        float(terms["loss"])  # waits for the device
        self.times.append(time.perf_counter())
        timed = len(self.times) - self.warm_steps
        if timed > 0 and self.times[-1] - self.times[self.warm_steps - 1] > TIMED_SECONDS:
            raise TimedEnough

    @property
    def seconds(self) -> float:
        """The median over the steps that count."""
        counted = self.times[self.warm_steps - 1 :]
        return median(after - before for before, after in pairwise(counted))


class Plateau:
    """Tells when the best loss of a stage has stopped falling.

    Args:
        patience: steps without progress that are too many; None for any number.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.lowest = math.inf
        self.since = 0

    def __call__(self, step: int, best_loss: Tensor) -> bool:
        """Return whether to stop; reads the loss off the device only where there is a patience."""
        if self.patience is None:
            return False
        loss = float(best_loss)
        if self.lowest - loss > PROGRESS * abs(self.lowest) or not math.isfinite(self.lowest):
            self.lowest, self.since = loss, step
        return step - self.since >= self.patience


def draw_views(
    steps: int, shift: tuple[int, int], flip: bool, generator: torch.Generator
) -> Tensor:
    """Draw each step's roll and mirror.

    Args:
        steps: how many.
        shift: most rows and columns to roll by, either way.
        flip: mirror half of the steps.
        generator: a CPU generator.

    Returns:
        (steps, 3) int64: rows, columns, and 1 to mirror; see ``engine.View``.
    """
    draws = [torch.randint(-s, s + 1, (steps,), generator=generator) for s in shift]
    mirrored = torch.rand(steps, generator=generator) < 0.5 if flip else torch.zeros(steps)
    return torch.stack([*draws, mirrored.long()], dim=1)


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """Return the factor on the learning rate at a step of a stage."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return rise
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * progress))
