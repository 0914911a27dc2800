"""Learning new classes: what its losses see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from dreamkit.types.needs import check_needs

IncrementalNeed = Literal["replay", "head"]
"""What a loss of learning new classes may ask for: images of old classes, last layers."""


@dataclass(frozen=True)
class Heads:
    """The last layers of a network that learns new classes, and of the network as it was.

    Args:
        inputs: what the layer of the network in training is given, float32, (N, ...): images of
            new classes, and after them those of old ones where there are such.
        old_inputs: of the same images in the network as it was, of the same shape.
        logits_of: from such inputs to logits (N, K), by the layer in training; the network's own.
        old_logits_of: to logits (N, K_old), by the layer as it was; it does not learn.
    """

    inputs: Tensor
    old_inputs: Tensor
    logits_of: Callable[[Tensor], Tensor]
    old_logits_of: Callable[[Tensor], Tensor]


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
        head: the last layers, and what they are given; None where no loss looks at them.
    """

    logits: Tensor
    old_logits: Tensor
    labels: Tensor
    replay_logits: Tensor | None = None
    replay_old_logits: Tensor | None = None
    replay_labels: Tensor | None = None
    head: Heads | None = None


class IncrementalLoss(ABC):
    """An entry of ``losses``: a term of learning new classes."""

    needs: ClassVar[frozenset[IncrementalNeed]] = frozenset()
    """What of a step it looks at beyond images of new classes."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        check_needs(cls, get_args(IncrementalNeed))

    @abstractmethod
    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the unweighted loss, a scalar of shape ()."""
