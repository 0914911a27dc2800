"""What FastDFKD and NAYER share: smoothed statistics, a rival after a warm-up, an adaptation.

A network is adapted to a batch's labels by some steps of an optimizer, and the best of its images
are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.flat_state import below, prefixed
from dreamkit.synthesizers.dreamer import Best, Session
from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.generative import Generative, GenerativeDreamer
from dreamkit.synthesizers.smoothed_statistics import SmoothedStatistics
from dreamkit.types import BatchPlan, Dream, LayerStatistics, OnStep


@dataclass(frozen=True, kw_only=True)
class Matching(Generative):
    """The options that methods with smoothed statistics and a warm-up have in common.

    Args:
        images: how many to dream.
        regularizers: the weighted terms beside the cross-entropy.
        batch_size: images made together, over which feature statistics are taken.
        steps: generator steps for each batch of dreams.
        latent: size of the generator's noise.
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees; null is an eighth of the
            side (4 at 32×32).
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        cross_entropy: weight of the cross-entropy to the labels.
        smoothing: share of earlier batches in the statistics that are matched, a moving average;
            0 matches each batch's own.
        warmup: the first batch, counted from 1, in which terms that need the student count.
        engine: how the teacher is computed.
    """

    cross_entropy: Annotated[float, Field(ge=0)] = 0.5
    flip: bool = True
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warmup: Annotated[int, Field(ge=0)] = 20

    @property
    def label_weight(self) -> float:
        """Weight of the cross-entropy to the labels."""
        return self.cross_entropy


def _nothing() -> None:
    """Leave the gradients as they are."""


@dataclass(frozen=True)
class Adaptation:
    """A network on its way to a batch's images.

    Args:
        network: makes pixels in (0, 1) of ``inputs``.
        inputs: what it is given in each step.
        labels: (N,), what its images are to show.
        views: each step's roll and mirror.
        optimizer: of all that is adapted.
        on_gradients: called in each step once the gradients are there.
    """

    network: nn.Module
    inputs: Tensor
    labels: Tensor
    views: Tensor
    optimizer: torch.optim.Optimizer
    on_gradients: Callable[[], None] = _nothing


class MatchingDreamer(GenerativeDreamer):
    """A method that adapts a network to each batch; it carries the smoothed statistics.

    Args:
        options: the recipe's.
        session: what it works with.
    """

    def __init__(self, options: Matching, session: Session) -> None:
        super().__init__(options, session)
        self.warmup = options.warmup
        self.first_whole_batch = max(options.warmup - 1, 0)
        self.statistics = SmoothedStatistics(options.smoothing, self._statistics_of_nothing())
        if options.smoothing and self.terms.tap is not None:
            self.terms.smoothed = self.statistics

    def state(self) -> dict[str, Tensor]:
        """Return the smoothed statistics."""
        return prefixed("statistics", self.statistics.state())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.statistics.restore(below("statistics", state), self.device)

    @torch.no_grad()
    def _statistics_of_nothing(self) -> tuple[LayerStatistics, ...]:
        """Return each layer's statistics for one blank image, for what the layer has stored."""
        if self.terms.tap is None:
            return ()
        return self.terms.tap(torch.zeros(1, *self.shape, device=self.device))[1]

    def adapt(
        self, plan: BatchPlan, adaptation: Adaptation, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Take a step for each view, and return the images of the best.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """
        labels, optimizer = adaptation.labels, adaptation.optimizer
        self.terms.student = self.student if plan.index + 1 >= self.warmup else None
        best = Best(torch.zeros(plan.size, *self.shape, device=self.device))
        for step, view in enumerate(adaptation.views):
            optimizer.zero_grad()
            images = self.render(adaptation.network, adaptation.inputs, evaluator)
            found = evaluator(images, labels, view)
            images.backward(found.gradient)
            best.offer(images, found.loss, found.terms)
            adaptation.on_gradients()
            optimizer.step()
            on_step(step + 1, {"loss": found.loss, **found.terms})
            self.on_images(images.detach(), labels)
        best.require_finite(plan)
        self._remember(best.found)
        return Dream(best.found, labels, float(best.loss))

    @torch.no_grad()
    def _remember(self, images: Tensor) -> None:
        """Take the batch's statistics into the smoothed ones."""
        if self.terms.smoothed is not None and self.terms.tap is not None:
            _, statistics = self.terms.tap(images)
            self.statistics.update(statistics)
