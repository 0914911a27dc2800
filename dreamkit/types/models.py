"""Networks and where they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

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
        notes: what was found out while it was loaded, for whoever takes it in to say.
    """

    model: nn.Module
    card: Card
    builder: dict[str, Any]
    pruning_record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class TeacherSource(ABC):
    """An entry of ``teachers``. Its constructor checks names and paths, and loads nothing."""

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str] | None:
        """Return what its option ``model`` may be; None if it cannot tell.

        Args:
            pretrained: only those that come with weights.
        """
        return None

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the architecture with random weights."""

    @abstractmethod
    def load(self, seed: int) -> Teacher:
        """Return the trained model on the CPU; ``seed`` is for weights that are random."""
