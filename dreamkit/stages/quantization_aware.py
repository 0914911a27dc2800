"""Training a network in integers on dreams: it learns what it was in float."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.registry import EntryOf
from dreamkit.stages.quantizing import Workbench, told_plainly
from dreamkit.stages.teaching import train_student
from dreamkit.training.distillation import Distillation
from dreamkit.training.losses.distillation import KLDivergence
from dreamkit.types import DistillationLoss, Images

STAGE = "training in integers"


@dataclass(frozen=True)
class QuantizationAwareTraining(Distillation):
    """Distillation from float, with the integers of the file simulated.

    Weights, biases and steps are learned (LSQ: Esser et al., ICLR 2020). Batch normalisation is
    folded into the weights before, so that options of it are none.
    """

    soft_loss: Annotated[DistillationLoss, EntryOf("distillation_losses")] = field(
        default_factory=KLDivergence
    )
    features: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=2)] = 32
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    precision: Literal["float32"] = "float32"
    statistics: Literal["keep"] = "keep"
    evaluate_every: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features:
            raise OptionError("features", "set it to 0: a file in integers tells of logits alone")


def trained_in_integers(
    bench: Workbench, kept: tuple[str, ...], images: Images, options: QuantizationAwareTraining
) -> Workbench:
    """Train a network in integers on images, and return the workbench that writes it.

    Args:
        bench: with the network in float, which teaches.
        kept: layers that stay in float.
        images: to train on.
        options: how.

    Raises:
        DreamkitError: the quantizer cannot train, knows no gradient of an operator, or the training
            diverged.
    """
    context = bench.context
    with placed("training"):
        with told_plainly():
            simulation = bench.quantization.simulated(kept)
        if simulation is None:
            raise DreamkitError("this quantizer cannot train in integers: leave it out")
        simulation.to(context.device)
        train_student(bench.teacher, simulation, images, options, context, STAGE, resumable=False)
        with told_plainly():
            return replace(bench, quantization=simulation.cpu().trained())
