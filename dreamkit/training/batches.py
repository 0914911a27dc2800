"""Walking through images in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.card import Card
from dreamkit.joined_images import JoinedImages
from dreamkit.types import Images, Labelled


@dataclass(frozen=True)
class Subset:
    """Some of a set of images, in an order of their own."""

    images: Images
    chosen: list[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        return self.images.batch([self.chosen[index] for index in indices])


@dataclass(frozen=True)
class Shifted:
    """A set of images whose labels start at another class."""

    images: Images
    first: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        stored, labels = self.images.batch(indices)
        return stored, labels + self.first

    @property
    def labels(self) -> Tensor:
        """The label of every image (N,)."""
        return labels_of(self.images) + self.first


def labels_of(images: Images) -> Tensor:
    """Return the label of every image (N,); sets that do not tell are read through."""
    if isinstance(images, Labelled):
        return images.labels
    return torch.cat([labels for _, labels in in_order(images, 256)])


def drawn_by_class(images: Images, count: int, generator: torch.Generator) -> Subset:
    """Return at most ``count`` images of each class, drawn at random without repetition."""
    labels = labels_of(images)
    chosen: list[int] = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        order = torch.randperm(len(places), generator=generator)[:count]
        chosen += places[order].tolist()
    return Subset(images, chosen)


def drawn(images: Images, count: int, generator: torch.Generator) -> Subset:
    """Return at most ``count`` images, drawn at random without repetition."""
    order = torch.randperm(len(images), generator=generator)
    return Subset(images, order[:count].tolist())


def drawn_evenly(sets: Sequence[Images], count: int, generator: torch.Generator) -> Subset:
    """Return at most ``count`` images of each set, as many of each, shuffled.

    That is what a training sees that takes as many of each in every step: a set that is smaller
    than the largest comes more than once.
    """
    sizes = [len(images) for images in sets]
    count = min(count, max(sizes))
    chosen, first = [], 0
    for size in sizes:
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
        chosen.append(first + torch.cat(passes)[:count])
        first += size
    order = torch.cat(chosen)
    order = order[torch.randperm(len(order), generator=generator)]
    return Subset(sets[0] if len(sets) == 1 else JoinedImages(sets), order.tolist())


def in_order(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once: stored images (N, C, H, W) and labels (N,)."""
    for first in range(0, len(images), batch_size):
        yield images.batch(range(first, min(first + batch_size, len(images))))


@dataclass(frozen=True)
class NormalisedBatches:
    """Images as networks are shown them, from the first on; its length is in batches.

    Args:
        images: stored.
        card: how to normalise them.
        device: where the networks are.
        batch_size: images in each batch.
        most: batches at the most; None for all images.
    """

    images: Images
    card: Card
    device: torch.device
    batch_size: int
    most: int | None = None

    def __len__(self) -> int:
        batches = -(-len(self.images) // self.batch_size)
        return batches if self.most is None else min(batches, self.most)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield normalised images (N, C, H, W) on the device."""
        for stored, _ in itertools.islice(in_order(self.images, self.batch_size), self.most):
            yield self.card.normalise(stored.to(self.device))


class Draws:
    """Deals out the images of a set that may grow: each once before any comes again.

    Batches are full; one may hold the last images of a pass and the first of the next.

    Args:
        batch_size: images in each, or all where there are fewer.
        generator: shuffles; on the CPU.
    """

    def __init__(self, batch_size: int, generator: torch.Generator) -> None:
        self.batch_size = batch_size
        self.generator = generator
        self.size = 0
        self._coming = torch.zeros(0, dtype=torch.int64)

    def add(self, images: int) -> None:
        """Let the set grow by some images; these are dealt out next."""
        added = self.size + torch.randperm(images, generator=self.generator)
        self._coming = torch.cat([added, self._coming])
        self.size += images

    def next(self) -> list[int]:
        """Return the positions of the next batch."""
        count = min(self.batch_size, self.size)
        while len(self._coming) < count:
            shuffled = torch.randperm(self.size, generator=self.generator)
            self._coming = torch.cat([self._coming, shuffled])
        dealt, self._coming = self._coming[:count], self._coming[count:]
        return dealt.tolist()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next batches depend on."""
        return {
            "size": torch.tensor(self.size),
            "coming": self._coming,  # never written to
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.size = int(state["size"])
        self._coming = state["coming"].clone()
        self.generator.set_state(state["generator"])
