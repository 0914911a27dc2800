"""FastDFKD: a generator that is meta-learnt so that a few steps make a batch.

Fang et al., "Up to 100x Faster Data-Free Knowledge Distillation", AAAI 2022. With the terms
``bn_feature`` (its form ``paper``, weight 10) and ``adversarial`` (1 to 1.33), and 0.5 of the
cross-entropy, it is the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.flat_state import below, optimizer_state, prefixed, restore_optimizer
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.dreamer import Best, Session
from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.generative import Generative, GenerativeDreamer
from dreamkit.synthesizers.generator_network import Generator
from dreamkit.synthesizers.smoothed_statistics import SmoothedStatistics
from dreamkit.types import BatchPlan, Dream, LayerStatistics, OnStep

BETAS = (0.5, 0.999)


class FastMetaDreamer(GenerativeDreamer):
    """FastDFKD bound to a teacher; it carries the meta-generator from batch to batch."""

    def __init__(self, options: FastMeta, session: Session) -> None:
        super().__init__(options, session)
        self.options = options
        self.first_whole_batch = max(options.warmup - 1, 0)
        self.generator = self.new_generator(derived_seed(session.seed, "generator"))
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=options.lr * options.steps, betas=BETAS
        )
        self.statistics = SmoothedStatistics(options.smoothing, self._statistics_of_nothing())
        if options.smoothing and self.terms.tap is not None:
            self.terms.smoothed = self.statistics

    def state(self) -> dict[str, Tensor]:
        """Return the meta-generator, its optimizer's momenta, and the smoothed statistics."""
        state = prefixed("generator", self.generator.state_dict())
        state |= prefixed("optimizer", optimizer_state(self.optimizer))
        return state | prefixed("statistics", self.statistics.state())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.generator.load_state_dict(below("generator", state))
        restore_optimizer(self.optimizer, below("optimizer", state))
        self.statistics.restore(below("statistics", state), self.device)

    @torch.no_grad()
    def _statistics_of_nothing(self) -> tuple[LayerStatistics, ...]:
        """Return each layer's statistics for one blank image, for what the layer has stored."""
        if self.terms.tap is None:
            return ()
        return self.terms.tap(torch.zeros(1, *self.shape, device=self.device))[1]

    def take_steps(
        self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Adapt a copy of the generator and its noise to a batch, and learn from the way there."""
        options = self.options
        self.terms.student = self.student if plan.index + 1 >= options.warmup else None
        draws = torch.Generator().manual_seed(plan.seed)
        labels = self.labels(plan.size, draws)
        noise = self.noise(plan.size, draws).requires_grad_()
        views = self.views(steps, draws)
        fast = copy.deepcopy(self.generator)
        groups: list[dict[str, Any]] = [
            {"params": list(fast.parameters())},
            {"params": [noise], "lr": options.lr_noise},
        ]
        inner = torch.optim.Adam(groups, lr=options.lr, betas=BETAS)
        self.optimizer.zero_grad(set_to_none=False)
        best = Best(torch.zeros(plan.size, *self.shape, device=self.device))
        for step in range(steps):
            inner.zero_grad()
            images = self.render(fast, noise, evaluator)
            found = evaluator(images, labels, views[step])
            images.backward(found.gradient)
            best.offer(images, found.loss, found.terms)
            if options.meta == "maml":
                self._gather(fast)
            inner.step()
            on_step(step + 1, {"loss": found.loss, **found.terms})
            self.on_images(images.detach(), labels)
        best.require_finite(plan)
        self._learn(fast)
        self._remember(best.found)
        return Dream(best.found, labels, float(best.loss))

    def _gather(self, fast: Generator) -> None:
        """Add the copy's gradients to the generator's: MAML to the first order."""
        for slow, quick in zip(self.generator.parameters(), fast.parameters(), strict=True):
            if quick.grad is not None:
                slow.grad = quick.grad.clone() if slow.grad is None else slow.grad + quick.grad

    @torch.no_grad()
    def _learn(self, fast: Generator) -> None:
        """Move the generator by what was learnt: an Adam step, or towards the copy (Reptile)."""
        if self.options.meta == "maml":
            self.optimizer.step()
            return
        for slow, quick in zip(self.generator.parameters(), fast.parameters(), strict=True):
            slow.lerp_(quick, self.options.reptile_rate)

    @torch.no_grad()
    def _remember(self, images: Tensor) -> None:
        """Take the batch's statistics into the smoothed ones."""
        if self.terms.smoothed is not None and self.terms.tap is not None:
            _, statistics = self.terms.tap(images)
            self.statistics.update(statistics)


@dataclass(frozen=True, kw_only=True)
class FastMeta(Generative):
    """FastDFKD: a meta-learnt generator makes a batch in a few steps (Fang et al., AAAI 2022).

    For each batch a copy of the generator and fresh noise are adapted for ``steps`` steps; the
    gradients on the way teach the generator itself (MAML to the first order). Its batches build
    on one another. The paper's rates are 5e-3 and 0.015 for 2 steps, 3e-3 and 0.01 for 5, 2e-3 and
    0.01 for 10. What the teacher sees is rolled and mirrored as one, where the authors crop and
    mirror each image.

    Args:
        images: how many to dream.
        regularizers: the weighted terms; the paper's are ``bn_feature`` in its form ``paper``
            (10) and ``adversarial`` (1.33 for ResNet-34, 1 for VGG, 1.1 for WRN), which needs a
            student in training.
        cross_entropy: weight of the cross-entropy to the labels.
        batch_size: images made together, over which feature statistics are taken.
        steps: inner steps for each batch; its best images are kept.
        latent: size of the generator's noise.
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees; null is an eighth of the
            side (4 at 32×32).
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        lr: Adam's inner learning rate; the generator's own is ``steps`` times that.
        lr_noise: Adam's inner learning rate for the noise.
        meta: how the generator learns: ``maml``, or ``reptile``, towards the adapted copy.
        reptile_rate: how far towards it.
        smoothing: share of earlier batches in the statistics that are matched, a moving average;
            0 matches each batch's own.
        warmup: the first batch, counted from 1, in which terms that need the student count.
        engine: how the teacher is computed.
    """

    cross_entropy: Annotated[float, Field(ge=0)] = 0.5
    flip: bool = True
    lr: Annotated[float, Field(gt=0)] = 3e-3
    lr_noise: Annotated[float, Field(gt=0)] = 1e-2
    meta: Literal["maml", "reptile"] = "maml"
    reptile_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warmup: Annotated[int, Field(ge=0)] = 20

    dreamer: ClassVar[type[GenerativeDreamer]] = FastMetaDreamer

    @property
    def label_weight(self) -> float:
        """Weight of the cross-entropy to the labels."""
        return self.cross_entropy
