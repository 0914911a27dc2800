"""Logits that stay where they were."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamkit.plugin import IncrementalLoss, IncrementalStep


@dataclass(frozen=True)
class LogitAnchor(IncrementalLoss):
    """Mean squared distance of the old classes' logits from what they were on replayed images."""

    needs = frozenset({"replay"})

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        assert step.replay_logits is not None, "the trainer supplies what 'needs' declares"
        assert step.replay_old_logits is not None
        old = step.replay_old_logits.shape[1]
        return (step.replay_logits[:, :old] - step.replay_old_logits).square().mean()
