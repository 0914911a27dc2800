"""Parameterisations: what the optimizer moves so that images change."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_parameterisations(register: Register) -> None:
    """Register the built-in parameterisations."""
    register("pixels", "dreamkit.parameterisations.pixels:Pixels")
    register("fourier", "dreamkit.parameterisations.fourier:Fourier")
