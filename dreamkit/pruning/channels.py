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


def distinct(*labels: Tensor) -> list[Tensor]:
    """Return tensors of one shape without what merely repeats: one place of such axes is left.

    Labels mostly are the same all over an image, and are kept as one number a channel, expanded.
    """
    found = list(labels)
    for dim, size in enumerate(found[0].shape):
        if size > 1 and all(tensor.stride(dim) == 0 for tensor in found):
            found = [tensor.narrow(dim, 0, 1) for tensor in found]
    return found


def any_channels(labels: Tensor) -> bool:
    """Whether some elements belong to channels."""
    return bool((distinct(labels)[0] != NONE).any())


class Trace:
    """What is known of a model's channels.

    ``uses`` are the axes of all layers that have channels; ``cuts`` the channels before each place
    at which the code cuts an activation, in the order of its run. ``slices`` are the channels that
    are cut at one place, each with the uses that may hold its number. ``outputs`` are the channels
    of the first output, one after the other. ``training_size`` is that of the images on which the
    model was followed as in training, too; None if it was not. ``heads`` are the channels that are
    heads of attention.
    """

    def __init__(self) -> None:
        self.uses: dict[tuple[str, str], Use] = {}
        self.cuts: list[list[int]] = []
        self.slices: list[tuple[list[int], list[tuple[str, str]]]] = []
        self.outputs: list[int] = []
        self.heads: set[int] = set()
        self.training_size: tuple[int, int, int] | None = None
        self._parents: list[int] = [NONE]
        self._roots: Tensor | None = None
        self._blocked: dict[int, str] = {}

    def fresh(self, count: int) -> list[int]:
        """Return new channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        self._roots = None
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
        if self._roots is None:
            roots = torch.tensor(self._parents)
            while bool(((further := roots[roots]) != roots).any()):
                roots = further
            self._roots = roots
        return self._roots[distinct(labels)[0]].expand(labels.shape)

    def couple(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Make one of channels that meet, pair by pair."""
        for a, b in zip(first, second, strict=True):
            if a == NONE or b == NONE:
                continue
            low, high = sorted((self.find(a), self.find(b)))
            if low != high:
                self._parents[high] = low
                self._roots = None
                if high in self._blocked:
                    self._blocked.setdefault(low, self._blocked.pop(high))

    def couple_tensors(self, first: Tensor, second: Tensor) -> None:
        """Make one of the channels that meet in two tensors of one shape."""
        one, other = (labels.reshape(-1) for labels in distinct(first, second))
        # One number a pair: neighbours mostly are alike, and numbers are faster sorted than rows.
        width = len(self._parents)
        pairs = (one * width + other)[one != other].unique_consecutive().unique().tolist()
        self.couple([pair // width for pair in pairs], [pair % width for pair in pairs])

    def couple_along(self, labels: Tensor, dim: int, size: int = 1) -> None:
        """Make one of the channels at the same place of each part of an axis, which goes alike."""
        first = labels.narrow(dim, 0, size)
        for place in range(size, labels.shape[dim], size):
            self.couple_tensors(first, labels.narrow(dim, place, size))

    def block(self, labels: Tensor | Sequence[int], reason: str) -> None:
        """Rule out that some channels are removed."""
        if isinstance(labels, Tensor):
            values = set(distinct(labels)[0].reshape(-1).unique_consecutive().tolist())
        else:
            values = set(labels)
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
        (few,) = distinct(labels)
        moved = few.movedim(dim, 0).reshape(few.shape[dim], -1)
        found = moved.amax(1)
        if not bool(((moved == NONE) | (moved == found[:, None])).all()):
            roots = self.roots(moved)
            found = roots.amax(1)
            if not bool(((roots == NONE) | (roots == found[:, None])).all()):
                self.block(labels, f"they are mixed before {where}")
        return found.expand(labels.shape[dim]).tolist()

    def varying(self, labels: Tensor) -> list[int]:
        """Return the axes along which there are different channels."""
        found = self.roots(distinct(labels)[0])
        unlike = [
            dim
            for dim in range(found.dim())
            if found.shape[dim] > 1 and bool((found != found.narrow(dim, 0, 1)).any())
        ]
        none = found == NONE
        if not bool(none.any()):
            return unlike
        low = found.masked_fill(none, torch.iinfo(torch.int64).max)
        return [dim for dim in unlike if bool((low.amin(dim) < found.amax(dim)).any())]


@dataclass(frozen=True)
class Place:
    """Where a run came to its end: an operation, or a module under way.

    Args:
        labels: channels of what it was given.
        module: its name; None for an operation.
    """

    labels: list[int]
    module: str | None = None


class TraceFailed(Exception):
    """The model raised something while its channels were followed; that is the cause.

    Args:
        trace: what was found until then.
        places: where it was, the innermost first.
    """

    def __init__(self, trace: Trace, places: Sequence[Place]) -> None:
        super().__init__("the model does not run")
        self.trace = trace
        self.places = places
