"""Which running statistics a student's BatchNorm layers have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from dreamkit.card import Card
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.training.difference_statistics import Kept, take_difference
from dreamkit.types import Images
from dreamkit.wording import and_more

Statistics = Literal["difference", "recalibrate", "keep"]
"""``difference``: the teacher's, moved by what student and teacher see differently of the images;
``recalibrate``: those of the images; ``keep``: those that there are."""


def take_statistics(
    how: Statistics,
    student: nn.Module,
    teacher: nn.Module,
    kept: Kept,
    images: Images,
    card: Card,
    device: torch.device,
    batches: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda batches: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Give a student's BatchNorm layers their statistics.

    Args:
        how: which.
        student: changed in its running statistics alone.
        teacher: what it was made from; of ``difference`` alone.
        kept: which of the teacher's channels the student has, as ``take_difference`` takes it.
        images: stored images.
        card: how to normalise them.
        device: where both networks are.
        batches: how many batches at the most.
        batch_size: images in each.
        advance: told how many batches are done.
        note: told of layers that have no counterpart in the teacher.
    """
    if how == "recalibrate":
        recalibrate(student, images, card, device, batches, batch_size, advance)
    elif how == "difference":
        alone = take_difference(
            student, teacher, kept, images, card, device, batches, batch_size, advance
        )
        if alone:
            note(
                f"{and_more(alone)}: BatchNorm statistics left as they were, as the teacher has no "
                "such layers, or they are TorchScript"
            )
