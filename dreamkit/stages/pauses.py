"""Training between rounds of pruning, after each of them or where the network has lost much."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from dreamkit.errors import placed
from dreamkit.evaluation.accuracy import predict
from dreamkit.seeds import derived_seed, stream
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.samples import Parts
from dreamkit.stages.teaching import train_student
from dreamkit.training.batches import drawn
from dreamkit.training.difference_statistics import Kept
from dreamkit.types import RunContext, Teacher

LOOKED_AT = 256
"""Images on which agreement is looked at after a round, at the most: three points of doubt."""


class Pauses:
    """When a network in pruning is trained, and what it agrees to with its teacher.

    Args:
        options: of the pruning.
        teacher: whose outputs are taught.
        parts: images that are trained on, and those that agreement is looked at on.
        context: the run's.
    """

    def __init__(
        self, options: ChannelPruning, teacher: Teacher, parts: Parts, context: RunContext
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.parts = parts
        self.context = context
        self.agreed = 1.0
        """Agreement with the teacher, in [0, 1], at first and after the last training."""
        self.looked: dict[str, float] = {}
        """What was seen after the last round, as its record holds it."""
        self._theirs: Tensor | None = None

    def after_round(self, number: int, student: nn.Module, kept: Kept) -> bool:
        """Train a student if it is time; return whether it was.

        Args:
            number: of the round, from 1.
            student: trained in place.
            kept: which of the teacher's channels it has.
        """
        how, drop, teacher = self.options.finetune, self.options.finetune_drop, self.teacher
        if how is None:
            return False
        if drop is not None:
            agreement = self._agreement(student)
            self.looked = {"agreement": agreement, "trained": 0.0}
            if self.agreed - agreement <= drop:
                return False
        with placed("finetune", always=False):
            stage = f"finetune {number}"
            # Each pause draws other images, other crops and other pairs to mix.
            pause = dataclasses.replace(self.context, seed=derived_seed(self.context.seed, stage))
            train_student(teacher, student, self.parts.fitted, how, pause, stage, False, kept)
        if drop is not None:
            self.agreed = self._agreement(student)
            self.looked = {"agreement": self.agreed, "trained": 1.0}
        return True

    def _agreement(self, student: nn.Module) -> float:
        context, card = self.context, self.teacher.card
        some = drawn(self.parts.looked_at, LOOKED_AT, stream(context.seed, "agreement"))
        with context.log.progress("agreement", len(some)) as advance:
            ours, _ = predict(student, some, card, context.device, advance)
        if self._theirs is None:
            self._theirs, _ = predict(self.teacher.model, some, card, context.device)
        return float((ours == self._theirs).float().mean())
