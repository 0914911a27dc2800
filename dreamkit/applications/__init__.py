"""Applications: what is done with a teacher and its dreams."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_applications(register: Register) -> None:
    """Register the built-in applications."""
    register("synthesize", "dreamkit.applications.synthesize:Synthesize")
    register("distill", "dreamkit.applications.distill:Distill")
    register("prune", "dreamkit.applications.prune:Prune")
    register("continual", "dreamkit.applications.continual:Continual")
    register("recover", "dreamkit.applications.recover:Recover")
    register("quantize", "dreamkit.applications.quantize:Quantize")
    register("judge", "dreamkit.applications.judge:Judge")
