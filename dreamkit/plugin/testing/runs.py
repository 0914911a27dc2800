"""Checks of what accompanies a run."""

from __future__ import annotations

from pathlib import Path

from dreamkit.plugin.testing.tiny import made, working
from dreamkit.types import Tracker


def check_tracker(entry: Tracker | type, folder: Path) -> None:
    """Check a tracker: it takes a run from its start to its end, and one that ends at once.

    Args:
        entry: the tracker.
        folder: an empty folder, such as pytest's ``tmp_path``.

    Raises:
        ContractError: it does not.
    """
    tracker, name = made("trackers", entry)
    for resumed in (False, True):
        with working(f"{name} in a run that {'goes on' if resumed else 'begins'}"):
            tracker.start(folder, {"name": "tiny"}, resumed)
            tracker.record("training", 1, {"loss": 0.5, "accuracy": None})
            if resumed:
                tracker.finish({"student.accuracy": 0.5})
    with working(f"{name}.close"):
        tracker.close()
