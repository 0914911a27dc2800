"""Which classes the images of a batch are to show, if any."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.errors import TeacherMismatch
from dreamkit.seeds import stream
from dreamkit.types import NO_LABEL, BatchPlan

Labels = Literal["balanced", "random"] | Annotated[tuple[int, ...], Field(min_length=1)]
"""Classes are dealt out, all (``balanced``) or those of a list, or drawn (``random``)."""


def deal_labels(
    labels: Labels,
    card: Card,
    seed: int,
    plan: BatchPlan,
    generator: torch.Generator,
    unconditional: float = 0.0,
) -> Tensor:
    """Return a batch's labels (N,), at its end those of images of no class: ``NO_LABEL``.

    Those that are dealt go on from the batch before, without looking at it: each round deals every
    class once, in an order of its own. Neighbours in a list of classes are often alike, as the
    birds of ImageNet are, and a batch should show some of everything.

    Args:
        labels: how.
        card: of the teacher.
        seed: the run's, for the order of each round.
        plan: of the batch.
        generator: of the batch, for what is drawn.
        unconditional: share of all images that show no class, in [0, 1].
    """
    if unconditional:
        ends = (plan.first_image, plan.first_image + plan.size)
        first, end = (with_class(images, unconditional) for images in ends)
        shown = replace(plan, first_image=first, size=end - first)
        dealt = deal_labels(labels, card, seed, shown, generator) if end > first else torch.empty(0)
        return torch.cat([dealt.long(), torch.full((plan.size - len(dealt),), NO_LABEL)])
    if labels == "random":
        return torch.randint(card.num_classes, (plan.size,), generator=generator)
    classes = torch.arange(card.num_classes) if labels == "balanced" else torch.tensor(labels)
    size, end = len(classes), plan.first_image + plan.size
    first_round = plan.first_image // size
    rounds = [
        classes[torch.randperm(size, generator=stream(seed, f"labels {number}"))]
        for number in range(first_round, -(-end // size))
    ]
    skipped = plan.first_image - first_round * size
    return torch.cat(rounds)[skipped : skipped + plan.size]


def with_class(images: int, unconditional: float) -> int:
    """Return how many of a run's first ``images`` show a class, the rest being unconditional."""
    return math.floor(images * (1 - unconditional) + 0.5)


@torch.no_grad()
def named(images: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
    """Return labels (N,) with the model's own choice for each image (N, C, H, W) of no class."""
    if not bool((labels == NO_LABEL).any()):
        return labels
    return torch.where(labels == NO_LABEL, model(images).argmax(1), labels)


def check_labels(labels: Labels, card: Card) -> None:
    """Refuse classes that a teacher does not have.

    Raises:
        TeacherMismatch: naming the first of them.
    """
    if isinstance(labels, str):
        return
    wrong = [label for label in labels if not 0 <= label < card.num_classes]
    if wrong:
        raise TeacherMismatch(
            f"label {wrong[0]} is none of the teacher's {card.num_classes} classes "
            f"(0 to {card.num_classes - 1})",
            ("labels",),
        )
