"""What statistics by difference start from while a network is pruned in rounds."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from dreamkit.copying import copied
from dreamkit.flat_state import prefixed
from dreamkit.model_state import tensors_of
from dreamkit.pruning.record import PruningRecord
from dreamkit.training.difference_statistics import Kept
from dreamkit.types import Teacher


class Reference:
    """The network whose BatchNorm statistics hold: the teacher, or the student as last trained.

    A training with BatchNorm frozen fits weights to the statistics that there are. What it taught
    stays only if the next removal moves these, and not the teacher's, as far as it changes what
    layers see. Where a training normalised by its batches' own statistics there are none that the
    weights were fitted to, and the teacher's, moved, hold for the images that it knows.

    Args:
        teacher: the reference until the student is trained so.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.network = teacher
        self.removals = 0
        """After how many removals the student was trained, 0 while the teacher is the reference."""
        self._cut = PruningRecord()

    def become(self, student: nn.Module, cut: PruningRecord, removals: int) -> None:
        """Take a student that was trained with BatchNorm frozen as the reference, as it is.

        Args:
            student: copied.
            cut: what it lacks of the teacher; goes on being added to.
            removals: how many it came by.
        """
        model = copied(student).requires_grad_(False)
        self.network = dataclasses.replace(self.network, model=model)
        self._cut = PruningRecord(dict(cut.kept))
        self.removals = removals

    def kept(self, cut: PruningRecord) -> Kept:
        """Return which of the reference's channels a student has.

        Args:
            cut: what the student lacks of the teacher.
        """
        return cut.kept_since(self._cut)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a student that was trained, below ``reference``."""
        return prefixed("reference", tensors_of(self.network.model)) if self.removals else {}
