"""Structured pruning: channel groups, cutting, and the choice of what goes."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_selections(register: Register) -> None:
    """Register the built-in ways to choose what goes next."""
    register("greedy", "dreamkit.pruning.selection:Greedy")
    register("knapsack", "dreamkit.pruning.knapsack:Knapsack")


@hookimpl
def register_channel_rules(register: Register) -> None:
    """Register the rules of PyTorch's layers."""
    rules = "dreamkit.pruning.layer_rules"
    register("convolution", f"{rules}:Convolution")
    register("linear", f"{rules}:Linear")
    register("normalisation", f"{rules}:Normalisation")
