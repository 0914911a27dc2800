"""Synthesizers: ways to dream images from a teacher."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_synthesizers(register: Register) -> None:
    """Register the built-in synthesizers."""
    register("deepinversion", "dreamkit.synthesizers.deepinversion:DeepInversion")
    register("dafl", "dreamkit.synthesizers.dafl:DAFL")
    register("fast_meta", "dreamkit.synthesizers.fast_meta:FastMeta")
    register("cmi", "dreamkit.synthesizers.cmi:CMI")
    register("mixed", "dreamkit.synthesizers.mixed:Mixed")
    register("nayer", "dreamkit.synthesizers.nayer:NAYER")
