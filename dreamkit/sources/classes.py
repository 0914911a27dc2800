"""Which classes of a data set are taken, and which of a network's outputs they are."""

from __future__ import annotations

from collections.abc import Sequence

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, did_you_mean


def taken(names: Sequence[str], wanted: Sequence[str | int] | None, what: str) -> list[int]:
    """Return the numbers of the classes that are wanted, in the order in which they are.

    Args:
        names: of all classes of the data set.
        wanted: some of them; None for all.
        what: the data set, for messages.

    Raises:
        DreamkitError: there is no such class, or one is wanted twice.
    """
    if wanted is None:
        return list(range(len(names)))
    found = []
    for name in map(str, wanted):
        if name not in names:
            choices = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            raise DreamkitError(
                f"{what} has no class '{name}'{did_you_mean(name, names)} (classes: {choices})",
                ("classes",),
            )
        found.append(list(names).index(name))
    if len(set(found)) < len(found):
        raise DreamkitError("a class is named twice", ("classes",))
    return found


def outputs_of(names: Sequence[str], card: Card, what: str) -> list[int]:
    """Return the output of a network that is each of some classes.

    Those of the card's names, where it knows all of them; else one for each in order.

    Raises:
        DreamkitError: there are more or fewer classes than outputs.
    """
    if card.class_names and set(names) <= set(card.class_names):
        return [card.class_names.index(name) for name in names]
    if len(names) != card.num_classes:
        raise DreamkitError(
            f"{what} has {len(names)} classes, {card.name} has {card.num_classes} outputs, and "
            "their names do not tell which is which; name the ones to take under 'classes', in "
            "the order of the outputs"
        )
    return list(range(len(names)))
