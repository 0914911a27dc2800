"""Which running statistics a student's BatchNorm layers have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.training.difference_statistics import Kept, Seen, take_difference
from dreamkit.wording import and_more

Statistics = Literal["difference", "recalibrate", "keep"]
"""``difference``: the teacher's, moved by what student and teacher see differently of the images;
``recalibrate``: those of the images; ``keep``: those that there are."""


def take_statistics(
    how: Statistics,
    student: nn.Module,
    teacher: nn.Module,
    kept: Kept,
    batches: NormalisedBatches,
    advance: Callable[[int], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
    together: bool = True,
    seen: Seen | None = None,
) -> None:
    """Give a student's BatchNorm layers their statistics.

    Args:
        how: which.
        student: changed in its running statistics alone.
        teacher: what it was made from; of ``difference`` alone.
        kept: which of the teacher's channels the student has, as ``take_difference`` takes it.
        batches: of images, where both networks are.
        advance: told how many batches are done.
        note: told of layers that have no counterpart in the teacher.
        together: as of ``take_difference``.
        seen: as of ``take_difference``.
    """
    if how == "recalibrate":
        recalibrate(student, batches, advance)
    elif how == "difference":
        alone = take_difference(student, teacher, kept, batches, advance, together, seen)
        if alone:
            note(
                f"{and_more(alone)}: BatchNorm statistics left as they were, as the teacher has no "
                "such layers, or they are TorchScript"
            )
