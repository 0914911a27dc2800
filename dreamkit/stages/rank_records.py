"""Records of every rank, for the log that the first alone writes."""

from __future__ import annotations

from collections.abc import Mapping

from dreamkit import distributed
from dreamkit.types import RunLog


class RankRecords:
    """Writes the first rank's records at once, and keeps the others' until all ranks meet.

    Args:
        log: of the run.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self._waiting: list[tuple[str, int, Mapping[str, float]]] = []

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Add one point to the curves of a stage."""
        if distributed.is_first():
            self.log.record(stage, step, numbers)
        else:
            self._waiting.append((stage, step, numbers))

    def gather(self) -> None:
        """Tell the first rank what the others have kept; every rank comes here."""
        for records in distributed.gather(self._waiting):
            for stage, step, numbers in records:
                self.log.record(stage, step, numbers)
        self._waiting = []
