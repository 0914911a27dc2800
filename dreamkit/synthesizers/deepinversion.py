"""DeepInversion: optimise noise until the teacher classifies it and knows its statistics.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020. Its
regularizers make it Noise (none), DeepDream (tv, l2), DeepInversion (+ bn_feature) or Adaptive
DeepInversion (+ js_compete).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.colour_shift import draw_colours
from dreamkit.recipe.open_terms import OpenTermsOf
from dreamkit.registry import EntryOf
from dreamkit.synthesizers.automatic_terms import parameterisation_for, terms_for
from dreamkit.synthesizers.competitor import competitor
from dreamkit.synthesizers.dreamer import Best, LossDreamer, Session, clipped
from dreamkit.synthesizers.engine import Engine, Evaluator, borrowed
from dreamkit.synthesizers.inversion_loss import OpenTerms, bound_loss, competing
from dreamkit.synthesizers.labels import Labels, check_labels, deal_labels, named
from dreamkit.synthesizers.planning import Phase, default_batch
from dreamkit.synthesizers.stage import DEFAULT_STEPS, Plateau, Stage, check_stages, default_stages
from dreamkit.synthesizers.token_dropping import (
    Evaluate,
    TokenDropping,
    TokenGate,
    gated,
    token_entry,
)
from dreamkit.synthesizers.views import draw_views
from dreamkit.training.schedule import lr_factor
from dreamkit.types import (
    BatchPlan,
    Dream,
    OnStep,
    Parameterisation,
    Synthesizer,
    Teacher,
    TeacherSource,
)

Beta = Annotated[float, Field(ge=0, lt=1)]
SYNC_EVERY = 25
"""Steps between looks at whether the loss is finite and falls; each look waits for the device."""
LARGEST_BATCH = 1024
"""What ``batch_size: auto`` does not go beyond: a batch is what an interruption loses."""


@dataclass(frozen=True)
class DeepInversion(Synthesizer):
    """DeepInversion and its ladder: cross-entropy to a label plus weighted regularizers.

    Yin et al., CVPR 2020, eq. 2 to 9. Images are optimised by Adam in normalised space; the last
    stage's best are kept, by the whole batch's loss. The defaults are not the paper's: in few steps
    they dream well from networks of 8 to 224 pixels.

    Args:
        regularizers: the weighted terms of R(x̂); ``auto`` chooses by what the teacher has.
        images: how many to dream.
        stages: resolutions in turn, joined by nearest upsampling; the last is the images'. Null is
            240 steps; where the network takes inputs of 128 pixels or more, and of half the side
            as well, the first 200 are at half the side.
        batch_size: images optimised together, over which feature statistics are taken. Null is 32
            from 128 pixels on, else 64; ``auto`` is the most that fit, up to 1,024: on a CPU in
            60 % of the memory available then, on a GPU by trial.
        lr: Adam's learning rate.
        betas: Adam's.
        schedule: of the learning rate within a stage.
        warmup: steps over which the learning rate rises from 0 at the start of a stage.
        jitter: largest random shift in pixels at the last stage's size, scaled in the others;
            null is a sixteenth of the side (2 at 32×32).
        flip: mirror the batch left to right in half of the steps; wrong for digits and text.
        colour_shift: how far each step changes contrast and brightness of each image's channels, at
            random, as networks see them (ColorShift: ``draw_colours``).
        clip: keep pixels in the valid range after every step.
        parameterisation: what moves; null is ``fourier``, its ``decay`` 1.75 without BatchNorm.
        patience: end a stage after so many steps in which its best loss fell by under a thousandth;
            looked at every 25 steps. Null never does.
        labels: ``balanced`` deals all classes out, shuffled, before any comes again; ``random``
            draws them; a list of classes is dealt as all are.
        unconditional: share of the images, in [0, 1], that are drawn to no class: regularizers
            alone shape them. Their labels are the teacher's choices in the end, so that
            ``synthesis.teacher_accuracy`` counts them as right.
        token_dropping: leave patches out, of a network that takes tokens; nothing is compiled then.
        student: the competitor of ``js_compete``.
        engine: how it is computed.
    """

    regularizers: Annotated[OpenTerms, OpenTermsOf("regularizers")] = "auto"
    images: Annotated[int, Field(ge=1)] = 1024
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    lr: Annotated[float, Field(gt=0)] = 0.1
    betas: tuple[Beta, Beta] = (0.7, 0.9)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    jitter: Annotated[int, Field(ge=0)] | None = None
    flip: bool = False
    colour_shift: Annotated[float, Field(ge=0)] = 0.0
    clip: bool = True
    parameterisation: Annotated[Parameterisation | None, EntryOf("parameterisations")] = None
    patience: Annotated[int, Field(ge=1)] | None = None
    labels: Labels = "balanced"
    unconditional: Annotated[float, Field(ge=0, le=1)] = 0.0
    token_dropping: TokenDropping | None = None
    student: Annotated[TeacherSource | None, EntryOf("teachers")] = None
    engine: Engine = field(default_factory=Engine)

    @property
    def needs_student(self) -> str | None:
        """The term that competes with a student which the recipe does not name, if one does."""
        return competing(self.regularizers) if self.student is None else None

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps over all stages."""
        return DEFAULT_STEPS if self.stages is None else sum(s.steps for s in self.stages)

    def image_size(self, teacher: Teacher) -> tuple[int, int]:
        """Return the last stage's height and width."""
        return (self.stages or default_stages(teacher))[-1].resolution(teacher.card)

    def known_batch_size(self, teacher: Teacher) -> int | None:
        """Return the batch size; None where it is left to the machine."""
        return None if self.batch_size == "auto" else self.batch_size or default_batch(teacher)

    @contextmanager
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
        seed: int = 0,
    ) -> Iterator[Inversion]:
        """Freeze the teacher and tap its statistics; on leaving it is as it was."""
        terms = terms_for(self.regularizers, teacher, note)
        with ExitStack() as stack:
            if (named := competitor(self.student, self.regularizers, teacher, seed)) is not None:
                student = named.to(device)
                stack.enter_context(borrowed(student, teacher.card.input_size))
            loss = stack.enter_context(bound_loss(teacher, terms, student))
            gate = stack.enter_context(gated(teacher, self.token_dropping, note))
            work = Session(teacher, loss, device, choices or {}, note, seed)
            inversion = Inversion(self, work, gate)
            stack.callback(inversion.evaluator.discard_compiled)
            yield inversion

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that the terms, the labels or the student do not fit."""
        terms_for(self.regularizers, teacher)
        competitor(self.student, self.regularizers, teacher)
        check_labels(self.labels, teacher.card)
        check_stages(self.stages or (), teacher)
        if self.token_dropping is not None:
            token_entry(teacher)


class Inversion(LossDreamer):
    """DeepInversion bound to a frozen teacher on a device.

    Args:
        options: the recipe's.
        session: what it works with.
        gate: leaves patches out of the teacher, where that is wanted.
    """

    def __init__(self, options: DeepInversion, session: Session, gate: TokenGate | None) -> None:
        eager = replace(options.engine, compile=False)  # each number of patches would be compiled
        super().__init__(options.engine if gate is None else eager, session)
        self.options = options
        self.form = parameterisation_for(options.parameterisation, self.teacher)
        self.gate = gate
        self.stages = options.stages or default_stages(self.teacher)
        card, share = self.teacher.card, options.unconditional
        self.deal = partial(deal_labels, options.labels, card, session.seed, unconditional=share)
        known = session.choices.get("batch_size", options.known_batch_size(self.teacher))
        largest = max((stage.resolution(card) for stage in self.stages), key=math.prod)
        self._batch_size = known or self.largest_batch(min(options.images, LARGEST_BATCH), largest)

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""
        return self._batch_size

    def make(self, plan: BatchPlan, evaluator: Evaluator, on_step: OnStep) -> Dream:
        """Optimise one batch through every stage.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """
        card, gate = self.teacher.card, self.gate
        generator = torch.Generator().manual_seed(plan.seed)
        labels = self.deal(plan, generator).to(self.device)
        images: Tensor | None = None
        loss, done = math.inf, 0
        for stage in self.stages:
            size = stage.resolution(card)
            if images is None:
                shape = (plan.size, card.input_size[0], *size)
                start = self.form.start(shape, generator).to(self.device)
            else:
                images = F.interpolate(images, size=size, mode="nearest")
                start = self.form.encode(images)

            def counted(step: int, terms: Mapping[str, Tensor], done: int = done) -> None:
                on_step(done + step, terms)

            evaluate = gate.begin(evaluator, stage.steps, generator) if gate else evaluator
            best = self._stage(start, labels, stage, generator, evaluate, counted)
            best.require_finite(plan)
            images = self.form.render(best.found, size)
            loss, done = float(best.loss), done + stage.steps
        assert images is not None  # there is a stage
        return Dream(images, named(images, labels, self.teacher.model), loss)

    def _stage(
        self,
        parameters: Tensor,
        labels: Tensor,
        stage: Stage,
        generator: torch.Generator,
        evaluate: Evaluate,
        on_step: OnStep,
    ) -> Best:
        """Optimise at one resolution; return the best parameters of its steps."""
        options, form = self.options, self.form
        size = stage.resolution(self.teacher.card)
        limits = self.teacher.card.pixel_range(parameters) if options.clip else None
        parameters = clipped(form, parameters, size, limits).contiguous().requires_grad_()
        optimizer = torch.optim.Adam(
            [parameters],
            lr=stage.lr or options.lr,
            betas=options.betas,
            fused=self.device.type in {"cpu", "cuda"},
        )
        jitter = stage.jitter(options.jitter, self.stages[-1], self.teacher.card)
        draws = draw_views(stage.steps, jitter, options.flip, generator).to(self.device)
        drawn = stage.steps, len(labels), self.teacher.card.input_size[0]
        colours = draw_colours(drawn, options.colour_shift, generator, self.device)
        best = Best(parameters.detach().clone())
        plateau = Plateau(options.patience)
        for step in range(stage.steps):
            factor = lr_factor(step, stage.steps, options.warmup, options.schedule)
            optimizer.param_groups[0]["lr"] = (stage.lr or options.lr) * factor
            images = form.render(parameters, size)
            seen = None if colours is None else colours[step]
            found = evaluate(images, labels, draws[step], seen)
            (gradient,) = torch.autograd.grad(images, [parameters], found.gradient)
            # Fused Adam pairs values by their place in memory, whatever the strides say.
            parameters.grad = gradient.contiguous()
            best.offer(parameters, found.loss, found.terms)  # of before the step
            optimizer.step()
            if limits is not None:
                with torch.no_grad():
                    parameters.copy_(clipped(form, parameters, size, limits))
            on_step(step + 1, {"loss": found.loss, **found.terms})
            self.on_images(images.detach(), labels)
            if self.gate is not None and self.gate.has_dropped:  # losses are of fewer patches
                best, plateau = best.anew(), Plateau(options.patience)
            if (step + 1) % SYNC_EVERY == 0 and (not best.finite or plateau(step + 1, best.loss)):
                break
        return best

    def phases(self) -> list[Phase]:
        """Return the stages of a full batch as what can be timed and compiled."""
        card, size, found = self.teacher.card, min(self.batch_size, self.options.images), []
        for stage in self.stages:
            generator = torch.Generator().manual_seed(0)
            resolution = stage.resolution(card)
            shape = (size, card.input_size[0], *resolution)
            start = self.form.start(shape, generator).to(self.device)
            labels = self.deal(BatchPlan(0, 0, size, 0), generator).to(self.device)
            images = self.form.render(start, resolution)
            sample = partial(self._sample, start, labels, stage)
            worth = stage.steps if self.gate is None else self.gate.options.worth(stage.steps)
            drawn = 1, size, card.input_size[0]
            colours = draw_colours(drawn, self.options.colour_shift, generator, self.device)
            seen = None if colours is None else colours[0]
            found.append(Phase(worth, sample, images, labels, seen))
        return found

    def _sample(
        self, start: Tensor, labels: Tensor, stage: Stage, steps: int, on_step: OnStep
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self._stage(start, labels, replace(stage, steps=steps), generator, self.evaluator, on_step)
