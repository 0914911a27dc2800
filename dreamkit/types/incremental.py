"""Learning new classes: what its losses see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class IncrementalStep:
    """One step of learning new classes, as losses see it.

    Args:
        logits: of images of the new classes, (N, K): old classes first.
        old_logits: of the same images, by the network as it was, (N, K_old).
        labels: (N,) int64, in [K_old, K).
        replay_logits: of images of the old classes, (M, K); None where there are none.
        replay_old_logits: of those, by the network as it was, (M, K_old).
        replay_labels: (M,) int64, in [0, K_old), or ``NO_LABEL``.
    """

    logits: Tensor
    old_logits: Tensor
    labels: Tensor
    replay_logits: Tensor | None = None
    replay_old_logits: Tensor | None = None
    replay_labels: Tensor | None = None


class IncrementalLoss(Protocol):
    """An entry of ``losses``.

    One that looks at images of old classes declares it:
    ``needs: ClassVar[frozenset[str]] = frozenset({"replay"})``.
    """

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the unweighted loss, a scalar of shape ()."""
