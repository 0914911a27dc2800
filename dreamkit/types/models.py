"""Networks and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from dreamkit.card import Card


@dataclass
class Teacher:
    """A trained model in eval mode, its card, and how it is built without its weights.

    Args:
        model: in eval mode.
        card: of the model.
        builder: the recipe entry that builds it, unweighted.
        pruning_record: what was pruned of what that builds, as ``PruningRecord`` writes it.
    """

    model: nn.Module
    card: Card
    builder: dict[str, Any]
    pruning_record: dict[str, Any] = field(default_factory=dict)


class TeacherSource(Protocol):
    """An entry of ``teachers``. Its constructor checks names and paths, and loads nothing."""

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""

    def load(self, seed: int) -> Teacher:
        """Return the trained model on the CPU; ``seed`` is for weights that are random."""
