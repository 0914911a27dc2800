"""Sign-gradient ascent on the teacher's confidence: a synthesizer written from scratch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.plugin import (
    BatchPlan,
    Dream,
    Estimate,
    Field,
    NonFiniteLoss,
    OnImages,
    OnStep,
    Synthesizer,
    Teacher,
)


@dataclass(frozen=True)
class SignAscent(Synthesizer):
    """Walk from noise to images that the teacher puts into their class, by the gradient's sign.

    The iterative method of Kurakin et al. (ICLR 2017 workshop), from noise in place of an image.
    Nothing keeps the images natural: they fool more than they show.

    Args:
        images: how many to dream.
        batch_size: images made together.
        steps: of the walk.
        stride: how far each step goes, in standard deviations of a pixel.
    """

    images: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 32
    steps: Annotated[int, Field(ge=1)] = 20
    stride: Annotated[float, Field(gt=0)] = 0.05

    @property
    def steps_per_batch(self) -> int:
        """Steps of the walk."""
        return self.steps

    def known_batch_size(self, teacher: Teacher) -> int:
        """Return the batch size."""
        return self.batch_size

    @contextmanager
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
        seed: int = 0,
    ) -> Iterator[Walker]:
        """Bind to a teacher, of which nothing is changed."""
        yield Walker(self, teacher, device)


class Walker:
    """Sign ascent on one teacher.

    Args:
        options: the recipe's.
        teacher: on ``device``.
        device: where to work.
    """

    def __init__(self, options: SignAscent, teacher: Teacher, device: torch.device) -> None:
        self.options, self.teacher, self.device = options, teacher, device
        self.on_images: OnImages = lambda images, labels: None

    @property
    def batch_size(self) -> int:
        """How many images are made together."""
        return self.options.batch_size

    @property
    def choices(self) -> Mapping[str, Any]:
        """Nothing is left to the machine."""
        return {}

    def watch(self, on_images: OnImages) -> None:
        """Show each step's images, for the progress picture; it may be left out."""
        self.on_images = on_images

    def state(self) -> Mapping[str, Tensor]:
        """Return nothing: a batch is its seed's alone."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from nothing."""

    def prepare(self, images: int) -> Estimate:
        """Time one step."""
        size = min(self.batch_size, images)
        start = time.perf_counter()
        self._walk(BatchPlan(0, 0, size, 0), 1, lambda step, terms: None)
        seconds = (time.perf_counter() - start) * self.options.steps * images / size
        return Estimate(seconds, memory_bytes=0)

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Walk from noise to a batch of images.

        Raises:
            NonFiniteLoss: the teacher's outputs are not finite.
        """
        return self._walk(plan, self.options.steps, on_step)

    def _walk(self, plan: BatchPlan, steps: int, on_step: OnStep) -> Dream:
        card = self.teacher.card
        turn = torch.arange(plan.first_image, plan.first_image + plan.size)
        labels = (turn % card.num_classes).to(self.device)
        draws = torch.Generator().manual_seed(plan.seed)
        images = torch.randn(plan.size, *card.input_size, generator=draws).to(self.device)
        low, high = card.pixel_range(images)
        for step in range(1, steps + 1):
            moved = images.detach().requires_grad_()
            loss = F.cross_entropy(self.teacher.model(moved), labels)
            (gradient,) = torch.autograd.grad(loss, [moved])
            images = (moved.detach() - self.options.stride * gradient.sign()).clamp(low, high)
            on_step(step, {"cross_entropy": loss.detach()})
            self.on_images(images, labels)
        with torch.no_grad():
            final = float(F.cross_entropy(self.teacher.model(images), labels))
        if not final < float("inf"):
            raise NonFiniteLoss(f"batch {plan.index} came to nothing: its loss is {final}")
        return Dream(images, labels, final)
