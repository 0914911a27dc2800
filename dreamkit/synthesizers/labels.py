"""Which classes the images of a batch are to show."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import TeacherMismatch
from dreamkit.types import BatchPlan

Labels = Literal["balanced", "random"] | Annotated[tuple[int, ...], Field(min_length=1)]
"""Classes are dealt out in turn, all (``balanced``) or those of a list, or drawn (``random``)."""


def deal_labels(
    labels: Labels, plan: BatchPlan, num_classes: int, generator: torch.Generator
) -> Tensor:
    """Return a batch's labels (N,); those dealt in turn go on from the batch before."""
    if labels == "random":
        return torch.randint(num_classes, (plan.size,), generator=generator)
    classes = torch.arange(num_classes) if labels == "balanced" else torch.tensor(labels)
    turn = torch.arange(plan.first_image, plan.first_image + plan.size)
    return classes[turn % len(classes)]


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
