"""Opening the images that a run is given, and telling what there is to know of them."""

from __future__ import annotations

from collections.abc import Callable

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, StoreError, placed
from dreamkit.joined_images import lacks_labels
from dreamkit.sources.joined import Joined
from dreamkit.store.source import Dreams
from dreamkit.types import Images, ImageSource, notes_of

_DREAMED = (
    "the evaluation images are dreams, and their labels the classes that they were asked for: "
    "accuracy on them says nothing of real data"
)


def opened(source: ImageSource, card: Card, note: Callable[[str], None]) -> Images:
    """Return a source's images, and note what it has to say of them.

    Args:
        source: the entry.
        card: of the network that is to see them.
        note: takes each note.
    """
    images = source.open(card)
    for text in notes_of(images):
        note(text)
    return images


def open_evaluation(source: ImageSource, card: Card, note: Callable[[str], None]) -> Images:
    """Return images that accuracy is to be measured on.

    Dreams are taken, with a note: how far a student agrees on those of another run may be asked.

    Args:
        source: the entry.
        card: of the network.
        note: takes each note.

    Raises:
        DreamkitError: there are none, or some have no label.
    """
    images = opened(source, card, note)
    if lacks_labels(images):
        raise DreamkitError("evaluation needs images with labels, all of them")
    if _are_dreams(source):
        note(_DREAMED)
    return images


def check_dreamed(source: ImageSource, card: Card) -> None:
    """Refuse images that were dreamed from other weights than those of a network.

    They show what the other knows, and its classes may be others. Where either does not tell its
    weights, nothing is refused.

    Args:
        source: the entry.
        card: of the network that is to work on them.

    Raises:
        StoreError: naming both, unless the source takes foreign dreams.
    """
    if isinstance(source, Joined):
        for number, part in enumerate(source.of):
            with placed("of", number):
                check_dreamed(part, card)
        return
    found, own = source.teacher_sha256(), card.weights_sha256
    if source.takes_foreign or found is None or own is None or found == own:
        return
    raise StoreError(
        f"the dreams are of another network (weights {found[:12]}...) than {card.name} "
        f"({own[:12]}...): dream them from this one, or say 'allow_foreign: true' "
        "(allow_foreign=True in Python) if they are meant"
    )


def dreamed_from(source: ImageSource | None) -> set[str]:
    """Return the hashes of the networks that a source's images were dreamed from."""
    if isinstance(source, Joined):
        return {found for part in source.of for found in dreamed_from(part)}
    found = None if source is None else source.teacher_sha256()
    return set() if found is None else {found}


def _are_dreams(source: ImageSource) -> bool:
    if isinstance(source, Joined):
        return any(_are_dreams(part) for part in source.of)
    return isinstance(source, Dreams) or source.teacher_sha256() is not None
