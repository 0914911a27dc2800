"""One resolution of an inversion: what it is, and when it has come far enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dreamkit.card import Card
from dreamkit.errors import TeacherMismatch
from dreamkit.teachers.intake import refusal_of_size
from dreamkit.types import Teacher

Size = Annotated[int, Field(ge=1)]

LARGE = 128
"""Side from which images are dreamed at half their size first, where a step costs a quarter."""
SMALL_STEPS, FULL_STEPS = 200, 40
"""At half the size, and at the whole."""
DEFAULT_STEPS = SMALL_STEPS + FULL_STEPS
PROGRESS = 1e-3
"""Relative fall of the best loss that counts as progress."""


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

    def jitter(self, pixels: int | None, last: Stage, card: Card) -> tuple[int, int]:
        """Return the largest shift along height and width.

        Args:
            pixels: at the last stage's size; None is a sixteenth of the side.
            last: of the stages.
            card: of the teacher.
        """
        height, width = self.resolution(card)
        if pixels is None:
            return height // 16, width // 16
        last_height, last_width = last.resolution(card)
        return round(pixels * height / last_height), round(pixels * width / last_width)


def default_stages(teacher: Teacher) -> tuple[Stage, ...]:
    """Return the stages that suit the images that a teacher takes."""
    _, height, width = teacher.card.input_size
    half = (height // 2, width // 2)
    if min(height, width) < LARGE or refusal_of_size(teacher, half) is not None:
        return (Stage(DEFAULT_STEPS),)
    return Stage(SMALL_STEPS, half), Stage(FULL_STEPS)


def check_stages(stages: Sequence[Stage], teacher: Teacher) -> None:
    """Refuse a stage at a size that a teacher does not take.

    Raises:
        TeacherMismatch: naming the stage, and what the teacher says.
    """
    for index, stage in enumerate(stages):
        size = stage.resolution(teacher.card)
        if size != teacher.card.input_size[1:]:
            reason = refusal_of_size(teacher, size)
            if reason is not None:
                raise TeacherMismatch(
                    f"{teacher.card.name} takes images of {teacher.card.input_size[1:]} and none "
                    f"of {size}: {reason}. Leave the size out",
                    ("stages", index, "size"),
                )


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
