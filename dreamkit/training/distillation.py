"""Knowledge distillation: a student learns the teacher's outputs on images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import load_state, seeded, tensors_of
from dreamkit.registry import EntryOf
from dreamkit.seeds import derived_seed, stream
from dreamkit.training.augmenter import Mixed
from dreamkit.training.feature_points import FeaturePoint, comparison_points
from dreamkit.training.losses.distillation import (
    LogitDistance,
    mixed_cross_entropy,
)
from dreamkit.training.losses.feature_distance import FeatureDistance, regressors_of
from dreamkit.training.options import Training
from dreamkit.training.reading import Batch
from dreamkit.training.trainer import Trainer
from dreamkit.types import NO_LABEL, DistillationLoss


@dataclass(frozen=True)
class Distillation(Training):
    """Distillation: how a student is taught.

    Hinton et al. 2015; DeepInversion (Yin et al., CVPR 2020), eq. 1 and section 4.1.

    Args:
        soft_loss: what is to be as the teacher's: ``kl``, the softmax's probabilities (eq. 1), or
            ``l1``, the logits, by their mean absolute difference (Fang et al. 2019). The gradient
            of ``l1`` is smaller: it wants some four times the learning rate of ``kl``, and a
            quarter of its weight decay.
        temperature: of the softmax, τ in eq. 1; ``l1`` has none.
        hard_labels: weight of the cross-entropy to the images' own labels; the distillation loss
            has the rest.
        features: weight of the mean squared difference between the student's features and the
            teacher's, each as a share of its variance (FitNets: Romero et al., ICLR 2015); added to
            the losses above. They are taken where all that a network goes on with is in one tensor:
            after each residual block, and after each layer of a network without. A student that
            does not have the teacher's layers is compared at equal shares of the way through both,
            at the lower of two resolutions, through linear maps that are trained with it and then
            dropped; there each channel of the teacher is a share of its own variance.
    """

    soft_loss: Annotated[DistillationLoss, EntryOf("distillation_losses")] = field(
        default_factory=LogitDistance
    )
    temperature: Annotated[float, Field(gt=0)] = 3.0
    hard_labels: Annotated[float, Field(ge=0, le=1)] = 0.0
    features: Annotated[float, Field(ge=0)] = 10.0
    # Untrained features may be ten times as large as the teacher's, and their squares throw a
    # student off its course before it has one.
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class Distiller(Trainer[Distillation]):
    """A student that learns the teacher's outputs, and its features, on one set of images.

    Args:
        arguments: those of ``Trainer``; the student has the teacher's outputs.

    Raises:
        DreamkitError: as ``Trainer``.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.features: FeatureDistance | None = None
        self.regressors = nn.ModuleDict()
        """Between features of different channels, by number of their point."""
        if self.options.features:
            draw = stream(self.seed, "noise that shows the features")
            noise = torch.randn(2, *self.card.input_size, generator=draw).to(self.device)
            points = comparison_points(self.teacher, self.student, self.kept, noise)
            if points:
                self.features = self._hints(points)
            else:
                self.note(
                    "features has no effect: student and teacher have no place where all that the "
                    "network goes on with is in one tensor, as maps, tokens or a vector in both"
                )

    def _hints(self, points: list[FeaturePoint]) -> FeatureDistance:
        """Set regressors where points want them, and have them trained with the student."""
        with seeded(derived_seed(self.seed, "regressors of the features")):
            self.regressors = regressors_of(points)
        self.regressors.to(self.device)
        learnt = list(self.regressors.parameters())
        used = {
            points[int(number)].name: _averaged(regressor)
            for number, regressor in self.regressors.items()
        }
        if learnt:
            self.parameters += learnt
            self.optimizer.add_param_group({"params": learnt})
            self.note(
                f"features are compared at {len(points)} places of the teacher, {points[0].name} "
                f"to {points[-1].name}, through linear maps that are trained along"
            )
        return FeatureDistance(self.student, self.teacher, points, used)

    def loss(self, *batches: Batch) -> Tensor:
        """Return the distillation loss, mixed with the labels' cross-entropy where that is asked.

        Raises:
            DreamkitError: ``hard_labels`` of images without labels.
        """
        ((stored, labels),) = batches
        if self.options.hard_labels and int(labels.min()) == NO_LABEL:
            raise DreamkitError("these images have no labels; set it to 0", ("hard_labels",))
        mixed = self.augmenter(self.card.normalise(stored), labels)
        if self.features is None:
            return self._of_logits(mixed, *self.forward(mixed.images))
        with self.features.watched():
            student_logits, teacher_logits = self.forward(mixed.images)
        distance = self.options.features * self.features.taken()
        return self._of_logits(mixed, student_logits, teacher_logits) + distance

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, the regressors among it."""
        return super().state() | prefixed("regressors", tensors_of(self.regressors))

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        super().restore(state)
        load_state(self.regressors, below("regressors", state))

    def _of_logits(self, mixed: Mixed, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        options = self.options
        soft = options.soft_loss(student_logits, teacher_logits, options.temperature)
        if options.hard_labels == 0:
            return soft
        hard = mixed_cross_entropy(student_logits, mixed)
        return (1 - options.hard_labels) * soft + options.hard_labels * hard


def _averaged(regressor: nn.Module) -> nn.Module:
    """Return a regressor with its gradients averaged over ranks where there are several."""
    return DistributedDataParallel(regressor) if distributed.size() > 1 else regressor
