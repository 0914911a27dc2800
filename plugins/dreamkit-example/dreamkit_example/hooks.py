"""What dreamkit loads. References are followed on first use, so this imports no torch."""

from __future__ import annotations

from dreamkit import hookimpl
from dreamkit.registry import Register


@hookimpl
def register_regularizers(register: Register) -> None:
    """Register ``color_balance``."""
    register("color_balance", "dreamkit_example.color_balance:ColorBalance")


@hookimpl
def register_criteria(register: Register) -> None:
    """Register ``weight_std``."""
    register("weight_std", "dreamkit_example.weight_std:WeightStd")
