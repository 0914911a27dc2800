"""How a student is taught: the options that every way of teaching has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dreamkit.errors import OptionError
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.schedule import Schedule, lr_factor
from dreamkit.training.statistics import Statistics

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Training:
    """Training: how a student is taught.

    Args:
        epochs: passes over the images; 0 leaves the student as it is.
        steps: optimizer steps, in place of epochs.
        lr: peak learning rate.
        batch_size: images a step.
        accumulate: parts in which a step's images go through the networks, to save memory;
            BatchNorm sees one part at a time.
        optimizer: ``sgd`` or ``adamw``.
        momentum: of SGD.
        nesterov: SGD's momentum is Nesterov's.
        weight_decay: of either.
        schedule: of the learning rate after the warm-up; ``step`` divides it by ten at each of
            the milestones.
        milestones: shares of all steps.
        warmup: share of the steps over which the learning rate rises.
        clip_norm: limit on the gradient's norm; null for none.
        augmentation: how images are varied.
        ema: keep a moving average of the weights with this decay, and let it be the student;
            null does not.
        freeze_bn: train with BatchNorm's running statistics as they are at the beginning; else each
            step normalises with its own images' and moves them.
        dropout: train with the network's own dropout and stochastic depth; else without.
        statistics: BatchNorm's at the end: ``keep``, those of training; ``difference``, the
            teacher's, moved by what student and teacher see differently of the images, for a
            student that has the teacher's layers; ``recalibrate``, those of the images, which for
            dreams are not those of real images.
        statistics_batches: batches of images that the last two are taken over.
        evaluate_every: steps between looks at the accuracy on evaluation images, each with the
            running statistics of training: what ``statistics`` does comes after the last of them;
            null never does.
        precision: of the networks' arithmetic; weights, statistics and losses stay float32.
            ``auto`` is bfloat16 where the hardware multiplies it natively, except for students
            with depthwise convolutions on a CPU.
        compile: compile both networks with ``torch.compile``; a minute or so, which pays in runs
            of a thousand steps and more.
    """

    epochs: Annotated[int, Field(ge=0)] = 30
    lr: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=2)] = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Schedule = "cosine"
    milestones: tuple[Share, ...] = (0.4, 0.8)
    augmentation: Augmentation = field(default_factory=Augmentation)
    ema: Share | None = None
    freeze_bn: bool = False
    dropout: bool = True
    statistics: Statistics = "keep"
    statistics_batches: Annotated[int, Field(ge=1)] = 16
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    nesterov: bool = True

    def __post_init__(self) -> None:
        if self.accumulate > self.batch_size // 2:
            raise ValueError(
                f"accumulate: {self.accumulate} parts of {self.batch_size} images leave BatchNorm "
                "less than two; choose fewer"
            )
        if self.freeze_bn and self.statistics == "recalibrate":
            raise OptionError(
                "statistics", "recalibrate would undo what freeze_bn keeps: set that to false"
            )

    def total_steps(self, images: int) -> int:
        """Return how many optimizer steps a run over this many images takes."""
        if self.steps is not None:
            return self.steps
        if self.epochs == 0 or images == 0:
            return 0
        return max(1, round(self.epochs * images / min(self.batch_size, images)))

    def lr_factor(self, step: int, total: int) -> float:
        """Return the learning rate's factor at a step: up over the warm-up, then the schedule."""
        warmup = round(self.warmup * total)
        return lr_factor(step, total, warmup, self.schedule, self.milestones)
