"""Importance criteria: which channels matter."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_criteria(register: Register) -> None:
    """Register the built-in criteria."""
    register("taylor", "dreamkit.criteria.taylor:Taylor")
    register("magnitude", "dreamkit.criteria.magnitude:Magnitude")
    register("bn_scale", "dreamkit.criteria.bn_scale:BNScale")
    register("fpgm", "dreamkit.criteria.fpgm:FPGM")
    register("random", "dreamkit.criteria.random:Random")
    register("latency_lut", "dreamkit.criteria.latency_lut:LatencyLUT")
