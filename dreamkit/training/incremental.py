"""Class-incremental learning: new classes from their images, old ones from what stands for theirs.

DeepInversion (Yin et al., CVPR 2020), section 4.5, eq. 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.registry import Term
from dreamkit.training.options import Training
from dreamkit.training.reading import Batch
from dreamkit.training.trainer import Trainer
from dreamkit.types import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class IncrementalTraining(Training):
    """Training on new classes: passes are over their images.

    DeepInversion, section 4.5.

    Args:
        epochs: passes over the images of the new classes.
        batch_size: images of new classes in a step; there are as many of old ones.
    """

    epochs: Annotated[int, Field(ge=0)] = 25
    lr: Annotated[float, Field(gt=0)] = 0.02
    batch_size: Annotated[int, Field(ge=2)] = 128
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.1
    freeze_bn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmentation.mixup:
            raise ValueError("augmentation.mixup: classes are learnt from whole images; use 0")


class IncrementalTrainer(Trainer[IncrementalTraining]):
    """A network that learns new classes on images of them, and keeps the old ones on others.

    Args:
        losses: the weighted terms of what it lowers.
        arguments: those of ``Trainer``. The student has the outputs of the ``teacher``, which is
            itself as it was, and then those of the new classes.
    """

    def __init__(self, losses: Sequence[Term[IncrementalLoss]], *arguments: Any) -> None:
        self.losses = losses
        super().__init__(*arguments)

    def loss(self, *batches: Batch) -> Tensor:
        """Return the weighted sum of the losses.

        Args:
            batches: of new classes and, where there are such images, of old ones.
        """
        varied = [
            self.augmenter(self.card.normalise(stored), labels).images for stored, labels in batches
        ]
        labels = [given for _, given in batches]
        sizes = [len(images) for images in varied]
        ours, theirs = (logits.split(sizes) for logits in self.forward(torch.cat(varied)))
        step = IncrementalStep(ours[0], theirs[0], labels[0])
        if len(batches) > 1:
            step = IncrementalStep(ours[0], theirs[0], labels[0], ours[1], theirs[1], labels[1])
        total = torch.zeros((), device=self.device)
        for term in self.losses:
            total = total + term.weight * term.entry(step)
        return total


class FirstOutputs(nn.Module):
    """A network with its first outputs alone: the old classes of one that learns new ones.

    Args:
        model: takes images.
        outputs: how many of its outputs are kept.
    """

    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, outputs)."""
        logits: Tensor = self.model(images)
        return logits[:, : self.outputs]
