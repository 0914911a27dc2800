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
    images_of,
)


@dataclass(frozen=True)
class Confidence(Application):
    """Say how sure the teacher is of images: the mean of its largest probability.

    Args:
        images: what it looks at; this run's own dreams by default.
        batch_size: images looked at together.
    """

    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    batch_size: Annotated[int, Field(ge=1)] = 256

    @property
    def needs_synthesis(self) -> bool:
        """Whether it dreams what it looks at."""
        return self.images is None

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Measure; the number is called ``teacher.confidence`` and lies in [0, 1]."""
        seen = images_of(teacher, images, context)  # dreamed first, where they are still to come
        total, count = 0.0, len(seen)
        with context.log.progress("confidence", count) as advance, torch.no_grad():
            for first in range(0, count, self.batch_size):
                stored, _ = seen.batch(range(first, min(first + self.batch_size, count)))
                logits = teacher.model(teacher.card.normalise(stored.to(context.device)))
                total += float(logits.softmax(dim=1).amax(dim=1).sum())
                advance(first + len(stored))
        context.log.metrics["teacher.confidence"] = total / count
        return Outcome(images=seen)
