"""Trackers: where a run's records go besides ``log.jsonl``."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_trackers(register: Register) -> None:
    """Register the built-in trackers."""
    register("csv", "dreamkit.trackers.csv:CSVTracker")
