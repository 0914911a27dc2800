"""The channels of a model: which meet, which layers have them, and which must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = 0
"""Stands for what is no channel: the image, constants, padding."""


@dataclass
class Use:
    """The channels along one axis of a layer, in its order.

    Args:
        name: of the layer, or of a parameter outside any.
        axis: ``out``, ``in``, ``parameter`` or ``attribute:NAME`` for a number of channels that a
            module keeps.
        labels: the channel of each position; ``NONE`` for none.
        tensors: the parameters and buffers that have these channels, by full name, and along which
            axis. One that is shorter has those of the first group alone.
        sizes: attributes of the layer that tell how many there are.
    """

    name: str
    axis: str
    labels: list[int]
    tensors: dict[str, int] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()


class Trace:
    """What is known of a model's channels.

    ``uses`` are the axes of all layers that have channels; ``cuts`` the channels before each place
    at which the code cuts an activation, in the order of its run. ``slices`` are the channels that
    are cut at one place, each with the uses that may hold its number. ``outputs`` are the channels
    of the first output, one after the other.
    """

    def __init__(self) -> None:
        self.uses: dict[tuple[str, str], Use] = {}
        self.cuts: list[list[int]] = []
        self.slices: list[tuple[list[int], list[tuple[str, str]]]] = []
        self.outputs: list[int] = []
        self._parents: list[int] = [NONE]
        self._blocked: dict[int, str] = {}

    def fresh(self, count: int) -> list[int]:
        """Return new channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return list(range(first, first + count))

    def find(self, label: int) -> int:
        """Return the channel that stands for all those that it has met."""
        root = label
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[label] != root:
            self._parents[label], label = root, self._parents[label]
        return root

    def roots(self, labels: Tensor) -> Tensor:
        """Return what stands for each label."""
        values, inverse = labels.unique(return_inverse=True)
        found = torch.tensor([self.find(value) for value in values.tolist()], dtype=torch.int64)
        return found[inverse].view(labels.shape)

    def couple(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Make one of channels that meet, pair by pair."""
        for a, b in zip(first, second, strict=True):
            if a == NONE or b == NONE:
                continue
            low, high = sorted((self.find(a), self.find(b)))
            if low != high:
                self._parents[high] = low
                if high in self._blocked:
                    self._blocked.setdefault(low, self._blocked.pop(high))

    def couple_tensors(self, first: Tensor, second: Tensor) -> None:
        """Make one of the channels that meet in two tensors of one shape."""
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)], 1).unique(dim=0).tolist()
        self.couple([a for a, _ in pairs], [b for _, b in pairs])

    def couple_along(self, labels: Tensor, dim: int, size: int = 1) -> None:
        """Make one of the channels at the same place of each part of an axis, which goes alike."""
        first = labels.narrow(dim, 0, size)
        for place in range(size, labels.shape[dim], size):
            self.couple_tensors(first, labels.narrow(dim, place, size))

    def block(self, labels: Tensor | Sequence[int], reason: str) -> None:
        """Rule out that some channels are removed."""
        values = labels.unique().tolist() if isinstance(labels, Tensor) else set(labels)
        for label in values:
            if label != NONE:
                self._blocked.setdefault(self.find(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why a channel cannot be removed; None if it can."""
        return self._blocked.get(self.find(label))

    def record(
        self,
        name: str,
        axis: str,
        labels: Sequence[int],
        tensors: Mapping[str, int] | None = None,
        sizes: Sequence[str] = (),
    ) -> None:
        """Note an axis; where a layer is called again, what it is given must go together."""
        use = Use(name, axis, list(labels), dict(tensors or {}), tuple(sizes))
        known = self.uses.setdefault((name, axis), use)
        if len(known.labels) == len(labels):
            self.couple(known.labels, labels)
        else:
            self.block([*known.labels, *labels], f"{name} is called with different channels")

    def along(self, labels: Tensor, dim: int, where: str) -> list[int]:
        """Return the channel of each position along an axis, which must be one and the same."""
        moved = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)
        found = moved.amax(1)
        if not bool(((moved == NONE) | (moved == found[:, None])).all()):
            roots = self.roots(moved)
            found = roots.amax(1)
            if not bool(((roots == NONE) | (roots == found[:, None])).all()):
                self.block(labels, f"they are mixed before {where}")
        return found.tolist()

    def varying(self, labels: Tensor) -> list[int]:
        """Return the axes along which there are different channels."""
        high = self.roots(labels)
        low = high.masked_fill(high == NONE, torch.iinfo(torch.int64).max)
        return [
            dim
            for dim in range(high.dim())
            if high.shape[dim] > 1 and bool((low.amin(dim) < high.amax(dim)).any())
        ]
