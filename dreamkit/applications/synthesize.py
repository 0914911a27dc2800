"""Synthesis alone: dream images and keep them."""

from __future__ import annotations

from dataclasses import dataclass

from dreamkit.stages.dreaming import images_of
from dreamkit.stages.measuring import measure_quality
from dreamkit.types import Application, Images, Outcome, RunContext, Synthesis, Teacher


@dataclass(frozen=True)
class Synthesize(Application):
    """Dream images and keep them in the run's store, for later runs or for export."""

    @property
    def needs_synthesis(self) -> bool:
        """It does nothing else."""
        return True

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream; with evaluation images the teacher's accuracy is reported too."""
        dreams = images_of(teacher, images, context)
        measure_quality("teacher", teacher.model, teacher, None, context)
        return Outcome(images=dreams)
