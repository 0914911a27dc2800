"""Saving a student, with what is true of it."""

from __future__ import annotations

from pathlib import Path

from dreamkit.model_state import tensors_of
from dreamkit.pruning.pattern import checked_patterns
from dreamkit.store.artifact import write_artifact
from dreamkit.types import Teacher


def save_student(folder: Path, student: Teacher) -> None:
    """Write a student's artifact, with the patterns that its weights have now.

    Raises:
        ArtifactError: the folder cannot be made.
    """
    record = checked_patterns(student.pruning_record, tensors_of(student.model))
    write_artifact(folder, student.model, student.card, student.builder, record)
