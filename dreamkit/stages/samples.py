"""Which of a run's images are for what: to make a network on, or to compare it with its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.card import Card
from dreamkit.resizing import for_card
from dreamkit.seeds import stream
from dreamkit.training.batches import Subset, drawn
from dreamkit.types import Images

ONE_IN = 10
"""Of so many images one is held back."""
LEAST = 32
"""Of fewer held-back images an agreement tells little, so that none are held back."""
MOST = 2048
"""Images held back at the most: an agreement of 0.9 on these is sure to 0.7 points."""


@dataclass(frozen=True)
class Parts:
    """A run's images in two parts.

    Args:
        fitted: channels are ranked on them, and layers, statistics and weights fitted to them.
        compared: a network is compared with its teacher on them, ``MOST`` at the most.
        apart: whether these are others. Where there are too few images, they are some of
            ``fitted``.
    """

    fitted: Images
    compared: Images
    apart: bool

    def for_card(self, now: Card, card: Card) -> Parts:
        """Return them as a network takes them, as ``resizing.for_card`` does."""
        fitted, compared = for_card(self.fitted, now, card), for_card(self.compared, now, card)
        return Parts(fitted, compared, self.apart)

    @property
    def tell(self) -> bool:
        """Whether there are enough to compare on; of dreams to come few may be there yet."""
        return not self.apart or len(self.compared) >= LEAST

    @property
    def looked_at(self) -> Images:
        """What decisions on the way are made on: held-back images, or others while those lack."""
        return self.compared if self.tell else self.fitted


def held_back(count: int, seed: int) -> Tensor:
    """Return the positions of images that nothing is fitted to, in order, int64.

    A tenth, spread evenly, ``MOST`` at the most; none where that would be fewer than ``LEAST``.
    The first image and two neighbours are never among them: so a batch of dreams that is there
    before the others, or has two images or more, always has some to fit to.

    Args:
        count: of all images.
        seed: the run's.
    """
    held = min(MOST, count // ONE_IN)
    if held < LEAST:
        return torch.zeros(0, dtype=torch.int64)
    edges = torch.arange(held + 1) * count // held
    room = edges.diff() - 1  # the first of each stretch stays
    share = torch.rand(held, generator=stream(seed, "held back"), dtype=torch.float64)
    return edges[:-1] + 1 + (share * room).long()


def parted(images: Images, seed: int, note: Callable[[str], None]) -> Parts:
    """Return images in two parts: to fit to, and to compare networks with their teacher on.

    Args:
        images: all that there are.
        seed: the run's.
        note: told how many are held back.
    """
    held = held_back(len(images), seed)
    note(what_is_held_back(len(images), len(held)))
    if not len(held):
        return Parts(images, some_of(images, seed), apart=False)
    free = torch.ones(len(images), dtype=torch.bool)
    free[held] = False
    fitted = Subset(images, free.nonzero().flatten().tolist())
    return Parts(fitted, Subset(images, held.tolist()), apart=True)


def some_of(images: Images, seed: int) -> Subset:
    """Return the images that a network is compared on where none are held back."""
    return drawn(images, MOST, stream(seed, "compared"))


def what_is_held_back(count: int, held: int) -> str:
    """Return a sentence for the user.

    Args:
        count: of all images.
        held: of those that are held back.
    """
    if held:
        return (
            f"{held} of {count} images are held back: nothing is fitted to them, and agreement "
            "with the teacher is measured on them"
        )
    return (
        f"agreement with the teacher is measured on images that the student is trained on: of "
        f"{count} images none are held back, of {ONE_IN * LEAST} and more a tenth"
    )


def fitting_sample(images: Images, count: int, seed: int, purpose: str) -> Subset:
    """Return at most ``count`` images to rank, fit or calibrate on, drawn at random.

    Args:
        images: that may be fitted to.
        count: >= 0.
        seed: the run's.
        purpose: what they are for; each has a draw of its own.
    """
    return drawn(images, count, stream(seed, purpose))
