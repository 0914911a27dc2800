"""Synthesis alone: dream images and keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dreamkit.stages.dreaming import dream_into_store
from dreamkit.stages.measuring import measure_quality
from dreamkit.types import RunContext


@dataclass(frozen=True)
class Synthesize:
    """Dream images and keep them in the run's store, for later runs or for export."""

    needs_synthesis: ClassVar[bool] = True

    def run(self, context: RunContext) -> None:
        """Dream; with evaluation images the teacher's accuracy is reported too."""
        dream_into_store(context)
        measure_quality(context, "teacher", context.teacher.model, None)
