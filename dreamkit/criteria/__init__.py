"""Importance criteria: which channels matter."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_criteria(register: Register) -> None:
    """Register the built-in criteria."""
    register("taylor", "dreamkit.criteria.taylor:Taylor")
    register("latency_lut", "dreamkit.criteria.latency_lut:LatencyLUT")
