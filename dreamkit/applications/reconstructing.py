"""Fitting what pruning left to the teacher, layer by layer, before any gradient step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.pruning.reconstruction import reconstruct
from dreamkit.pruning.surgery import Surgery
from dreamkit.training.batches import drawn, in_order
from dreamkit.types import Images, RunContext


@dataclass(frozen=True)
class Reconstruction:
    """Least squares in each layer between what it puts out and what the teacher's does.

    He et al., ICCV 2017, eq. 5. It takes as long as the images take through half of both networks,
    times their layers.

    Args:
        images: how many it is fitted on, drawn from those that there are.
        batch_size: images at once; memory holds their patches (k² times a layer's input).
        ridge: how far the weights are held to what they were, as a share of the mean square of what
            they multiply.
    """

    images: Annotated[int, Field(ge=2)] = 1024
    batch_size: Annotated[int, Field(ge=2)] = 128
    ridge: Annotated[float, Field(gt=0)] = 1e-3


def reconstruct_student(
    context: RunContext,
    student: nn.Module,
    surgery: Surgery,
    images: Images,
    options: Reconstruction,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit a student to the run's teacher; its BatchNorm is then the teacher's.

    Adds ``reconstruction.seconds`` to the metrics, and which layers could not be fitted to the
    details.

    Args:
        context: the run's.
        student: what pruning left; changed in place.
        surgery: what it lacks of the teacher.
        images: stored.
        options: how.
        masks: by parameter name, 0 where a weight is to stay zero.
    """
    start = time.perf_counter()
    card, device, teacher = context.teacher.card, context.device, context.teacher.model
    sample = drawn(images, options.images, torch.Generator().manual_seed(context.seed))
    batches = [
        card.normalise(stored.to(device)) for stored, _ in in_order(sample, options.batch_size)
    ]
    context.log.begin("reconstruction")
    with context.log.progress("reconstruction", 1000) as advance:
        fitted = reconstruct(
            student,
            teacher,
            surgery,
            batches,
            masks,
            options.ridge,
            lambda done, of: advance(round(1000 * done / of)),
        )
    layers = [name for name, m in student.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    context.details["reconstruction_left_alone"] = sorted({*layers} - {*fitted})
    context.metrics["reconstruction.seconds"] = time.perf_counter() - start
