"""Giving a student its BatchNorm statistics within a run."""

from __future__ import annotations

from torch import nn

from dreamkit.out_of_memory import enough_memory
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.difference_statistics import Kept
from dreamkit.training.statistics import Statistics, take_statistics
from dreamkit.types import Images, RunContext, Teacher


def give_statistics(
    how: Statistics,
    teacher: Teacher,
    student: nn.Module,
    kept: Kept,
    images: Images,
    batch_size: int,
    context: RunContext,
    place: tuple[str, ...] = ("batch_size",),
) -> None:
    """Give what pruning left its BatchNorm statistics, over all of some images.

    Args:
        how: which.
        teacher: what was pruned; in rounds of pruning the student as it was last trained.
        student: changed in its running statistics alone.
        kept: which of that network's channels it has.
        images: stored.
        batch_size: images at once.
        context: the run's.
        place: where ``batch_size`` stands in the application, for messages.
    """
    if how == "keep":
        return
    batches = NormalisedBatches(images, teacher.card, context.device, batch_size)
    cure = f"lower {'.'.join(place)} ({batch_size} now)"
    with (
        context.log.progress("statistics", len(batches)) as advance,
        enough_memory("taking BatchNorm statistics", cure, place),
    ):
        take_statistics(how, student, teacher.model, kept, batches, advance, context.log.note)
