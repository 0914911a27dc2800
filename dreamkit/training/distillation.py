"""Knowledge distillation: a student learns the teacher's outputs on images without labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.model_state import frozen, seeded
from dreamkit.training.batches import epochs_of
from dreamkit.training.losses import distillation_loss
from dreamkit.types import Images


@dataclass(frozen=True)
class Distillation:
    """Distillation by SGD with Nesterov momentum, a linear warm-up and a cosine schedule.

    Args:
        epochs: passes over the images; 0 leaves the student as it is.
        temperature: of the softmax, τ in eq. 1.
        lr: peak learning rate.
        batch_size: images a step.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup: share of the steps over which the learning rate rises.
        clip_norm: limit on the gradient's norm; null for none.
    """

    epochs: Annotated[int, Field(ge=0)] = 30
    temperature: Annotated[float, Field(gt=0)] = 3.0
    lr: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=2)] = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_norm: Annotated[float, Field(gt=0)] | None = None

    def steps(self, images: int) -> int:
        """Return how many optimizer steps a run over this many images takes."""
        full, rest = divmod(images, self.batch_size)
        return self.epochs * (full + (rest > 1 or images == 1))


def distil(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    card: Card,
    options: Distillation,
    device: torch.device,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor], None],
) -> None:
    """Train ``student`` in place on the teacher's outputs; it is left in eval mode.

    Args:
        student: takes the same images as the teacher and has the same outputs.
        teacher: only read; left as it was.
        images: stored images; their labels are not used.
        card: how to normalise them.
        options: hyper-parameters.
        device: where both models are.
        generator: orders the images.
        on_step: called with the steps done and the loss, which it may leave on the device.

    Raises:
        DreamkitError: training diverged.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
    )
    total = options.steps(len(images))
    warmup = round(options.warmup * total)
    student.train()
    # Dropout and stochastic depth draw from torch's global generators.
    with frozen(teacher), seeded(generator.initial_seed()):
        batches = epochs_of(images, options.batch_size, options.epochs, generator)
        for step, (stored, _) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * warmup_cosine(step, total, warmup)
            x = card.normalise(stored.to(device))
            with torch.no_grad():
                target = teacher(x)
            loss = distillation_loss(student(x), target, options.temperature)
            optimizer.zero_grad()
            loss.backward()
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            optimizer.step()
            on_step(step + 1, loss.detach())
    student.eval()
    if not all(p.isfinite().all() for p in parameters):
        raise DreamkitError(
            f"the student's weights are not finite after {total} steps: lower lr, or set clip_norm",
            ("lr",),
        )


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Return the learning rate's factor: up over ``warmup`` steps, then half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
