"""Recovery of a network whose single weights were pruned, without its data.

"Data-free recovery after pruning" (arXiv 2511.20702): global unstructured ℓ1 pruning of all
convolutions and linear layers, then distillation on dreams with what is gone kept at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.copying import copied
from dreamkit.errors import OptionError
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import load_state, tensors_of
from dreamkit.pruning.pattern import (
    Pattern,
    by_reason,
    checked_patterns,
    choose_in_groups,
    left_whole,
)
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.unstructured import (
    choose_weights,
    count_layers,
    kept_at_zero,
    left_alone,
    remove_weights,
    sparsity_of,
)
from dreamkit.registry import EntryOf
from dreamkit.stages.adaptive import Adaptive, TrainsOnImages
from dreamkit.stages.measuring import glance, measure_quality
from dreamkit.stages.pruning_checkpoint import PruningCheckpoint
from dreamkit.stages.reconstructing import Reconstruction, reconstruct_student
from dreamkit.stages.samples import Parts, fitting_sample
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import Recovery, StudentTraining, trainable_copy
from dreamkit.training.statistics import Statistics
from dreamkit.types import (
    Images,
    ImageSource,
    Outcome,
    RoundPruned,
    RunContext,
    Synthesis,
    Teacher,
)


@dataclass(frozen=True)
class Recover(TrainsOnImages):
    """Set a share of all weights to zero, then recover by distillation with the zeros kept.

    arXiv 2511.20702. The smallest weights of all convolutions and linear layers together go, or,
    by a ``pattern``, the smallest of each few. Files get smaller by it; eager PyTorch gets no
    faster.

    Args:
        sparsity: share of the weights that goes; this or ``pattern``.
        pattern: ``N:M``, such as ``2:4``, which NVIDIA's sparse tensor cores take: of every M
            weights along the input channels, the N largest stay. Layers whose inputs M does not
            divide, and transposed convolutions, are left alone.
        rounds: in how many steps that is reached. A share: large steps first (Zhu & Gupta 2017, "To
            prune, or not to prune", eq. 1). A pattern: M - N at the most, 3:4 before 2:4. After
            each, ``reconstruction`` gives what is left the work of what went, so that the next one
            finds other weights the smallest.
        training: distillation from the teacher.
        statistics: BatchNorm's once the weights are gone, without ``reconstruction`` alone:
            ``difference``, the teacher's, moved by what student and teacher see differently of the
            images; ``recalibrate``, those of the images, which for dreams are not those of real
            images; ``keep``, those that it has.
        statistics_batches: batches of images that these are taken over.
        reconstruction: least squares, layer by layer, between what is left and the teacher, after
            each round; null leaves the weights as they are until the training.
        images: what the network recovers on; this run's own dreams by default.
        adaptive: dream while the network recovers, against it (Adaptive DeepInversion, with the
            regularizer ``js_compete``); null dreams everything first.
    """

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    pattern: str | None = None
    rounds: Annotated[int, Field(ge=1)] = 1
    training: Recovery = field(default_factory=Recovery)
    statistics: Statistics = "difference"
    statistics_batches: Annotated[int, Field(ge=1)] = 16
    reconstruction: Reconstruction | None = None
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        self.check_adaptive()
        if self.sparsity is None and self.pattern is None:
            raise OptionError("sparsity", "say what goes: set 'sparsity' or 'pattern'")
        if self.sparsity is not None and self.pattern is not None:
            raise OptionError("pattern", "set it or 'sparsity': each says what goes")
        if self.rounds > 1 and self.reconstruction is None:
            raise OptionError(
                "rounds",
                "without 'reconstruction' the same weights go in one round: set that too, or 1",
            )
        if self.groups is not None:
            gone = self.groups.of - self.groups.kept
            if self.rounds > gone:
                raise OptionError(
                    "rounds",
                    f"{self.pattern} takes {gone} of every {self.groups.of} weights, one a round "
                    f"at the least: set {gone} or less",
                )

    @property
    def groups(self) -> Pattern | None:
        """The pattern, read.

        Raises:
            OptionError: it is none.
        """
        try:
            return None if self.pattern is None else Pattern.parse(self.pattern)
        except ValueError as error:
            raise OptionError("pattern", str(error)) from error

    @property
    def schedule(self) -> list[float]:
        """The share that is gone after each round: s·(1 - (1 - t)³) at t of the way."""
        assert self.sparsity is not None
        left = [1 - (number + 1) / self.rounds for number in range(self.rounds)]
        return [self.sparsity * (1 - share**3) for share in left]

    @property
    def _choices(self) -> list[Callable[[nn.Module], dict[str, Tensor]]]:
        """What chooses the weights that stay in each round."""
        if self.groups is None:
            return [partial(choose_weights, sparsity=share) for share in self.schedule]
        on_the_way = self.groups.on_the_way(self.rounds)
        return [partial(choose_in_groups, pattern=pattern) for pattern in on_the_way]

    def make_student(self, teacher: Teacher, context: RunContext) -> Teacher:
        """Return a copy of the teacher without the smallest weights, as they are in one round."""
        made = dataclasses.replace(teacher, model=copied(teacher.model))
        remove_weights(made.model, self._choices[-1](made.model))
        return made

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream, prune, recover."""
        left = self._left(teacher.model)
        for reason, names in by_reason(left).items():
            context.log.note(f"the weights of {names} stay: {reason}")
        training = StudentTraining(
            teacher, images, context, self.training, self.adaptive, "recovery", "training"
        )
        # Rounds fit the network on dreams, so the first are made against one that is not fitted.
        first = training.first_images(self.make_student(teacher, context).model)
        measure_quality("teacher", teacher.model, teacher, None, context)
        student = trainable_copy(teacher.model)
        masks = self._prune(teacher, student, first, context)
        measure_quality("pruned", student, teacher, first, context)
        with kept_at_zero(student, masks):
            taught_on = training.run(student, first)
        measure_quality("student", student, teacher, taught_on, context)
        context.log.metrics["student.sparsity"] = sparsity_of(student)
        card = dataclasses.replace(
            teacher.card, origin=f"pruned from {teacher.card.name}", weights_sha256=None
        )
        record = self._record(teacher, student, masks, left, context)
        made = dataclasses.replace(teacher, model=student, card=card, pruning_record=record)
        return Outcome(made, taught_on.fitted)

    def _left(self, model: nn.Module) -> dict[str, str]:
        """Return the layers whose weights stay, by name, with the reason."""
        return left_alone(model) if self.groups is None else left_whole(model, self.groups)

    def _record(
        self,
        teacher: Teacher,
        student: nn.Module,
        masks: Mapping[str, Tensor],
        left: Mapping[str, str],
        context: RunContext,
    ) -> dict[str, Any]:
        """Return the student's record, and report which layers have the pattern, as looked up."""
        if self.pattern is None:
            return teacher.pruning_record
        own = PruningRecord(patterns=dict.fromkeys(masks, self.pattern))
        whole = own.after(PruningRecord.from_json(teacher.pruning_record)).to_json()
        record = checked_patterns(whole, tensors_of(student))
        has = [name for name in own.patterns if name in record["patterns"]]
        context.log.metrics["student.pattern_share"] = len(has) / count_layers(student)
        context.log.details["pattern"] = {
            "pattern": self.pattern,
            "weights": has,
            "left_alone": dict(left),
        }
        return record

    def _prune(
        self, teacher: Teacher, student: nn.Module, first: Parts, context: RunContext
    ) -> dict[str, Tensor]:
        """Prune in all rounds, from where an interrupted try was; return the masks."""
        images = first.fitted
        checkpoint = PruningCheckpoint(teacher, context)
        masks, done = self._go_on(student, checkpoint.go_on(images), context.device)
        with context.log.progress("pruning", self.rounds) as advance:
            for number, choose in enumerate(self._choices[done:], done + 1):
                masks = distributed.broadcast_tensors(choose(student), context.device)
                remove_weights(student, masks)
                fit = self.reconstruction
                if fit is None:
                    self._take_statistics(teacher, student, images, context)
                else:
                    record = PruningRecord()
                    reconstruct_student(teacher, student, record, images, fit, context, masks)
                look = {
                    "sparsity": sparsity_of(student),
                    **glance(student, teacher, first, context),
                }
                context.log.record("pruning", number, look)
                if fit is not None:  # else it is as quickly done again as read
                    tensors = prefixed("student", tensors_of(student)) | prefixed("masks", masks)
                    checkpoint.save(images, number, tensors, {})
                context.log.emit(RoundPruned(round=number, numbers=look))
                context.log.check(together=True)
                advance(number)
        return masks

    def _go_on(
        self,
        student: nn.Module,
        found: tuple[dict[str, Tensor], dict[str, Any]] | None,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], int]:
        """Take what an interrupted try pruned; return the masks, and how many rounds it did."""
        if found is None:
            return {}, 0
        state, facts = found
        load_state(student, below("student", state))
        masks = {name: mask.to(device) for name, mask in below("masks", state).items()}
        return masks, facts["rounds"]

    def _take_statistics(
        self, teacher: Teacher, student: nn.Module, images: Images, context: RunContext
    ) -> None:
        size = self.training.batch_size
        count = self.statistics_batches * size
        sample = fitting_sample(images, count, context.seed, "statistics")
        place = ("training", "batch_size")
        give_statistics(self.statistics, teacher, student, {}, sample, size, context, place)
