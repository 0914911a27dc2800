"""Learning rates over the steps of a training or an inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "cosine", "step"]


def lr_factor(
    step: int, total: int, warmup: int, schedule: Schedule, milestones: Sequence[float] = ()
) -> float:
    """Return the factor on the peak learning rate at a step.

    Args:
        step: from 0.
        total: steps in all.
        warmup: steps over which it rises linearly, at the start.
        schedule: what follows: nothing, half a cosine to 0, or a tenth from each milestone on.
        milestones: shares of ``total``, for ``step``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    if schedule == "step":
        return float(0.1 ** sum(step >= share * total for share in milestones))
    return 1.0
