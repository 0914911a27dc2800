"""Teaching a student within a run: distillation with its progress and its record."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from dreamkit.training.distillation import Distillation, distil
from dreamkit.types import Images, RunContext

_CURVE_POINTS = 200


def train_student(
    context: RunContext, student: nn.Module, images: Images, options: Distillation, stage: str
) -> None:
    """Distil the run's teacher into ``student`` on ``images``, reporting under ``stage``.

    Adds ``training.seconds``.
    """
    start = time.perf_counter()
    total = options.steps(len(images))
    every = max(1, total // _CURVE_POINTS)
    context.log.begin(stage)
    with context.log.progress(stage, total) as advance:

        def on_step(done: int, loss: Tensor) -> None:
            advance(done)
            if done % every == 0 or done == total:
                context.log.record(stage, done, {"loss": float(loss)})

        distil(
            student,
            context.teacher.model,
            images,
            context.teacher.card,
            options,
            context.device,
            torch.Generator().manual_seed(context.seed),
            on_step,
        )
    context.metrics["training.seconds"] = time.perf_counter() - start
