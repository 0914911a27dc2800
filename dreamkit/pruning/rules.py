"""One call of a layer or an operation, and what its rule finds out about the channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dreamkit.pruning.channels import Trace


@dataclass(frozen=True)
class Call:
    """What a rule is given; ``dreamkit.types.ChannelCall`` describes all but what follows.

    Args:
        trace: what is known of the model's channels.
        caller: name and module that the call is made in.
    """

    trace: Trace
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    caller: tuple[str, nn.Module] | None = None

    @property
    def channels(self) -> list[Tensor]:
        """The channels of every tensor that it was given."""
        given = tree_flatten((self.args, dict(self.kwargs)))[0]
        return [value for value in given if isinstance(value, Tensor)]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def along(self, channels: Tensor, dim: int) -> list[int]:
        """Return the channel of each position along an axis."""
        return self.trace.along(channels, dim, self.name)

    def holds(
        self,
        channels: Tensor,
        dim: int,
        tensors: Mapping[str, int],
        sizes: Sequence[str] = (),
        axis: str = "out",
    ) -> list[int]:
        """Note that a layer has the channels that it is given."""
        along = self.along(channels, dim)
        self._record(axis, along, tensors, sizes)
        return along

    def makes(
        self,
        count: int,
        dim: int,
        tensors: Mapping[str, int],
        sizes: Sequence[str] = (),
        groups: int = 1,
    ) -> Tensor:
        """Note that a layer makes new channels, and return those of its output."""
        made = self.trace.fresh(count // groups) * groups
        self._record("out", made, tensors, sizes)
        return self.spread(made, dim)

    def _record(
        self, axis: str, along: Sequence[int], tensors: Mapping[str, int], sizes: Sequence[str]
    ) -> None:
        full = {f"{self.name}.{key}" if self.name else key: dim for key, dim in tensors.items()}
        self.trace.record(self.name, axis, along, full, sizes)

    def spread(self, along: Sequence[int], dim: int) -> Tensor:
        """Return the channels of the (first) output, given that of each position of an axis."""
        output = next(t for t in tree_flatten(self.output)[0] if isinstance(t, Tensor))
        shape = [1] * output.dim()
        shape[dim] = -1
        return torch.tensor(list(along)).view(shape).expand(output.shape)

    def fix(self, channels: Tensor | Sequence[int], reason: str) -> None:
        """Rule out that some channels are removed, and say why."""
        self.trace.block(channels, reason)

    def couple_groups(self, along: Sequence[int], groups: int) -> None:
        """Make one of the channels at the same place of each group: all must keep as many."""
        size = len(along) // groups
        for first in range(size, len(along), size):
            self.trace.couple(along[:size], along[first : first + size])

    def repeat(self) -> Any:
        """Do to the channels what was done to the elements: for what only moves them about."""
        run = self.target.forward if isinstance(self.target, nn.Module) else self.target
        # Contiguous: a view of what it goes beside may not be one of an expanded tensor.
        args, kwargs = tree_map(_contiguous, (self.args, dict(self.kwargs)))
        return tree_map(_copied, run(*args, **kwargs))


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
