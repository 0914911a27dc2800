"""The tensors that a model returns, in whatever it returns them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield every tensor of what a model returns: of containers, and of objects of any class."""
    if isinstance(value, Tensor):
        yield value
    if isinstance(value, Tensor | nn.Module | type) or id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    for part in (*inside, *getattr(value, "__dict__", {}).values()):
        yield from tensors_in(part, seen)
