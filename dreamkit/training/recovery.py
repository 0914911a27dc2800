"""Recovery: distillation of a pruned network from what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dreamkit.training.distillation import Distillation


@dataclass(frozen=True)
class Recovery(Distillation):
    """Distillation with defaults for a network that is nearly right already.

    Args:
        hints: weight of what the layers that are left put out, against the teacher's
            (``training/hints``); 0 goes by the outputs alone.
    """

    temperature: Annotated[float, Field(gt=0)] = 5.0
    lr: Annotated[float, Field(gt=0)] = 0.01
    hints: Annotated[float, Field(ge=0)] = 0.0
