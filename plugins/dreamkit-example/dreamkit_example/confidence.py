"""How sure a teacher is of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from dreamkit.plugin import (
    Application,
    EntryOf,
    Field,
    Images,
    ImageSource,
    Outcome,
    RunContext,
    Synthesis,
    Teacher,
)


@dataclass(frozen=True)
class Confidence(Application):
    """Say how sure the teacher is of images: the mean of its largest probability.

    Args:
        images: what it looks at.
        batch_size: images looked at together.
    """

    images: Annotated[ImageSource, EntryOf("sources")]
    batch_size: Annotated[int, Field(ge=1)] = 256

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Measure; the number is called ``teacher.confidence`` and lies in [0, 1]."""
        assert images is not None, "the option 'images' is required"
        assert not isinstance(images, Synthesis), "it dreams nothing itself"
        total, count = 0.0, len(images)
        with context.log.progress("confidence", count) as advance, torch.no_grad():
            for first in range(0, count, self.batch_size):
                stored, _ = images.batch(range(first, min(first + self.batch_size, count)))
                logits = teacher.model(teacher.card.normalise(stored.to(context.device)))
                total += float(logits.softmax(dim=1).amax(dim=1).sum())
                advance(first + len(stored))
        context.log.metrics["teacher.confidence"] = total / count
        return Outcome(images=images)
