"""Fitting what pruning left to the teacher, layer by layer, before any gradient step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from dreamkit.out_of_memory import enough_memory
from dreamkit.pruning.activations import weighted_layers
from dreamkit.pruning.reconstruction import reconstruct
from dreamkit.pruning.record import PruningRecord
from dreamkit.stages.samples import fitting_sample
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.difference_statistics import take_difference
from dreamkit.types import Images, RunContext, RunLog, Teacher
from dreamkit.wording import and_more


@dataclass(frozen=True)
class Reconstruction:
    """Least squares in each layer between what it puts out and what the teacher's does.

    He et al., ICCV 2017, eq. 5. It takes as long as the images take through half of the network,
    times its layers, and holds up to a gigabyte of what the teacher's put out.

    Args:
        images: how many it is fitted on, drawn from those that there are.
        batch_size: images at once.
        ridge: how far the weights are held to what they were, as a share of the mean square of what
            they multiply.
    """

    images: Annotated[int, Field(ge=2)] = 1024
    batch_size: Annotated[int, Field(ge=2)] = 128
    ridge: Annotated[float, Field(gt=0)] = 1e-3


def reconstruct_student(
    teacher: Teacher,
    student: nn.Module,
    pruning_record: PruningRecord,
    images: Images,
    options: Reconstruction,
    context: RunContext,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit a student to its teacher; all that is not fitted is then the teacher's.

    Where a layer that lost something cannot be fitted, the teacher's BatchNorm statistics do not
    hold behind it, and move by what student and teacher see differently. Adds
    ``reconstruction.seconds`` to the metrics, and the layers that could not be fitted to the
    details.

    Args:
        teacher: that it is fitted to.
        student: what pruning left; changed in place.
        pruning_record: what it lacks of the teacher.
        images: stored.
        options: how.
        context: the run's.
        masks: by parameter name, 0 where a weight is to stay zero.
    """
    start = time.perf_counter()
    context.log.begin("reconstruction")
    cure = f"lower reconstruction.images ({options.images} now) or its batch_size"
    with (
        context.log.progress("reconstruction", 1000) as advance,
        enough_memory("reconstruction", cure, ("reconstruction",)),
    ):

        def fitted(done: int, of: int) -> None:
            advance(round(1000 * done / of))
            context.log.check(together=True)

        _fit(teacher, student, pruning_record, images, options, context, masks, fitted)
    log = context.log
    spent = log.metrics.get("reconstruction.seconds", 0.0)
    log.metrics["reconstruction.seconds"] = spent + time.perf_counter() - start


def _fit(
    teacher: Teacher,
    student: nn.Module,
    pruning_record: PruningRecord,
    images: Images,
    options: Reconstruction,
    context: RunContext,
    masks: Mapping[str, Tensor] | None,
    advance: Callable[[int, int], None],
) -> None:
    sample = fitting_sample(images, options.images, context.seed, "reconstruction")
    batches = NormalisedBatches(sample, teacher.card, context.device, options.batch_size)
    done = reconstruct(
        student, teacher.model, pruning_record, list(batches), masks, options.ridge, advance
    )
    left = [name for name, _ in weighted_layers(student) if name not in done]
    lost = [name for name in left if f"{name}.weight" in {*pruning_record.kept, *(masks or {})}]
    if lost:
        context.log.note(
            f"reconstruction: {and_more(lost)} cannot be fitted, so BatchNorm's "
            "statistics move by what that changes"
        )
        take_difference(student, teacher.model, pruning_record.kept, batches)
    context.log.details["reconstruction_left_alone"] = left


def reconstruction_facts(log: RunLog) -> dict[str, Any]:
    """Return what a checkpoint keeps of the fits that were done."""
    return {
        "seconds": log.metrics.get("reconstruction.seconds"),
        "left_alone": log.details.get("reconstruction_left_alone"),
    }


def restore_facts(log: RunLog, facts: Mapping[str, Any]) -> None:
    """Report the fits of an interrupted try too."""
    if facts["seconds"] is not None:
        log.metrics["reconstruction.seconds"] = facts["seconds"]
        log.details["reconstruction_left_alone"] = facts["left_alone"]
