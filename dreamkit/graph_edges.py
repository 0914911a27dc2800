"""Tensors as autograd's graph knows them: by what made them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

Edge = tuple[Node, int]
"""A tensor in a graph: what made it, and which of the tensors that this made (of a split) it is."""


def edge(x: Any) -> Edge | None:
    """Return where a tensor stands in the graph, None if it stands in none."""
    return (x.grad_fn, x.output_nr) if isinstance(x, Tensor) and x.grad_fn is not None else None
