"""Structured pruning: channel groups, surgery, and the choice of what goes."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_selections(register: Register) -> None:
    """Register the built-in ways to choose what goes next."""
    register("greedy", "dreamkit.pruning.selection:Greedy")
    register("knapsack", "dreamkit.pruning.knapsack:Knapsack")
