"""Class-incremental learning: new classes from their images, old ones from what stands for theirs.

DeepInversion (Yin et al., CVPR 2020), section 4.5, eq. 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.model_state import inputs_of
from dreamkit.registry import Term
from dreamkit.training.options import Training
from dreamkit.training.reading import Batch
from dreamkit.training.trainer import Trainer
from dreamkit.types import Heads, ImageSource, IncrementalLoss, IncrementalStep

_ROUNDING = 0.05
"""Largest difference that bfloat16 makes of logits, as a share of the largest of them."""


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
        for option in ("mixup", "cutmix"):
            if getattr(self.augmentation, option):
                raise ValueError(
                    f"augmentation.{option}: classes are learnt from whole images; use 0"
                )


def check_losses(
    losses: Sequence[Term[IncrementalLoss]],
    replay: ImageSource | None,
    training: IncrementalTraining,
) -> None:
    """Refuse losses that would not get what they look at, and images that no loss looks at.

    Args:
        losses: the terms.
        replay: what stands for the images of old classes.
        training: how classes are learnt.

    Raises:
        OptionError: naming the option to change.
    """
    if not losses:
        raise OptionError("losses", "give at least one loss")
    looking = [term.name for term in losses if "replay" in term.entry.needs]
    if looking and replay is None:
        raise OptionError(
            "replay", f"the loss '{looking[0]}' needs images of old classes, so it cannot be null"
        )
    at_head = [term.name for term in losses if "head" in term.entry.needs]
    if not looking and not at_head and replay is not None:
        raise OptionError("replay", "no loss looks at images of old classes: set it to null")
    if at_head and training.compile:
        raise OptionError(
            "training",
            f"the loss '{at_head[0]}' sees the last layer by a hook: set compile to false",
        )


class IncrementalTrainer(Trainer[IncrementalTraining]):
    """A network that learns new classes on images of them, and keeps the old ones on others.

    Args:
        losses: the weighted terms of what it lowers.
        arguments: those of ``Trainer``. The student has the outputs of the ``teacher``, which is
            itself as it was, and then those of the new classes.
        head: name of the layer that makes the outputs, for losses that look at it.
    """

    def __init__(
        self, losses: Sequence[Term[IncrementalLoss]], *arguments: Any, head: str | None = None
    ) -> None:
        self.losses = losses
        super().__init__(*arguments)
        self._heads: list[tuple[str, nn.Module]] = []
        if head is not None and any("head" in term.entry.needs for term in losses):
            networks = {"own": self.student, "old": self.teacher}
            self._heads = [(whose, model.get_submodule(head)) for whose, model in networks.items()]

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
        with inputs_of(self._heads) as tap:
            ours, theirs = (logits.split(sizes) for logits in self.forward(torch.cat(varied)))
        step = IncrementalStep(ours[0], theirs[0], labels[0])
        if len(batches) > 1:
            step = IncrementalStep(ours[0], theirs[0], labels[0], ours[1], theirs[1], labels[1])
        if self._heads:
            own, old = (tap.inputs[whose].float() for whose, _ in self._heads)
            logits_of, old_logits_of = (partial(_logits, layer) for _, layer in self._heads)
            if self.done == 0:
                with torch.no_grad():
                    _check_last(logits_of(own), torch.cat(ours))
            step = replace(step, head=Heads(own, old, logits_of, old_logits_of))
        total = torch.zeros((), device=self.device)
        for term in self.losses:
            total = total + term.weight * term.entry(step)
        return total


def _check_last(of_head: Tensor, outputs: Tensor) -> None:
    """Refuse a network that goes on after its last layer, as losses would see other outputs.

    Raises:
        DreamkitError: it does.
    """
    limit = _ROUNDING * float(outputs.abs().max())
    if of_head.shape != outputs.shape or float((of_head - outputs).abs().max()) > limit:
        raise DreamkitError(
            "the network goes on after its last layer, so what that puts out are not the logits: "
            "leave out the losses that look at the head (feature_distillation, head_cross_entropy)",
            ("losses",),
        )


def _logits(head: nn.Module, inputs: Tensor) -> Tensor:
    """Return logits (N, K) of what a last layer is given, averaged over positions if it has any."""
    found: Tensor = head(inputs)
    positions = range(1, found.dim() - 1) if isinstance(head, nn.Linear) else range(2, found.dim())
    return found.mean(list(positions)) if positions else found


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
