"""Which classes of a data set are taken, and which of a network's outputs they are."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.wording import and_more

_IMAGENET = 1000
_MEND = (
    "rename them, or list the ones to take under 'classes' (of a recipe's source), in the order of "
    "the outputs"
)


@dataclass(frozen=True)
class Matched:
    """Which outputs of a network some classes are.

    Args:
        outputs: one for each class, in the order of the classes.
        note: what the user must know of how they were found; None where names told.
    """

    outputs: list[int]
    note: str | None = None


def taken(names: Sequence[str], wanted: Sequence[str | int] | None, what: str) -> list[int]:
    """Return the numbers of the classes that are wanted, in the order in which they are.

    Args:
        names: of all classes of the data set.
        wanted: some of them; None for all. A name that is written otherwise (``same_name``) will
            do where there is one such class.
        what: the data set, for messages.

    Raises:
        DreamkitError: there is no such class, or one is wanted twice.
    """
    if wanted is None:
        return list(range(len(names)))
    found = []
    for name in map(str, wanted):
        number = _found(name, names)
        if number is None:
            choices = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            raise DreamkitError(
                f"{what} has no class '{name}'{did_you_mean(name, names)} (classes: {choices})",
                ("classes",),
            )
        found.append(number)
    if len(set(found)) < len(found):
        raise DreamkitError("a class is named twice", ("classes",))
    return found


def outputs_of(
    names: Sequence[str],
    card: Card,
    what: str,
    ordered: bool = False,
    places: Sequence[str] | None = None,
) -> Matched:
    """Return the output of a network that is each of some classes.

    Names tell, where the card has names; then numbers and ImageNet's synsets; then the order, where
    there is one class for each output.

    Args:
        names: of the classes.
        card: the network's.
        what: the data set, for messages.
        ordered: whether somebody put them in this order, and not the alphabet.
        places: of the classes and of others beside them, among which the order may count.

    Raises:
        DreamkitError: neither tells, or some names tell and others do not.
    """
    ours = list(card.class_names or ())
    if list(names) == ours:
        return Matched(list(range(len(names))))
    found = [_found(name, ours) for name in names]
    if any(number is not None for number in found):
        return Matched(*_by_name(names, found, card, what, ordered))
    numbers = numeric(names) or []
    by_number = _by_number(names, numbers, card, what) if numbers else None
    told = (None if ordered else by_number) or _by_synset(names, card, what)
    for whole in (names, places or ()):
        if told is None and len(whole) == card.num_classes:
            told = _by_order(names, whole, card, what, ordered)
    told = told or by_number
    strange = [name for name in names if not numeric([name])]
    if told is None and 0 < len(strange) < len(names) / 2:
        raise DreamkitError(
            f"{what}: {quoted(strange)} {_are(strange)} no number, as the other classes are; "
            f"{_MEND}"
        )
    if told is None:
        raise DreamkitError(
            f"{what} has {len(names)} classes, {card.name} has {card.num_classes} outputs, and "
            "their names do not tell which is which; name the ones to take under 'classes', in "
            "the order of the outputs"
        )
    return told


def in_order(names: Sequence[str]) -> list[str]:
    """Return names in the order of their numbers, where all are numbers; else the alphabet's."""
    return sorted(names, key=int) if numeric(names) else sorted(names)


def numeric(names: Sequence[str]) -> list[int] | None:
    """Return the numbers that names are; None if some is none, or two are the same."""
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else None


def same_name(name: str) -> str:
    """Return what is the same for all ways to write a name.

    Case, ``_`` and ``-`` for spaces, composed or decomposed accents and zeros before a number make
    no difference.
    """
    words = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()
    plain = unicodedata.normalize("NFC", words)
    return str(int(plain)) if plain.isascii() and plain.isdigit() else plain


def quoted(names: Sequence[str]) -> str:
    """Return a few names for a message, and how many more there are."""
    return and_more([f"'{name}'" for name in names])


def _found(name: str, choices: Sequence[str]) -> int | None:
    """Return the number of the one choice that is called so; None if none or several are."""
    exact = [number for number, choice in enumerate(choices) if choice == name]
    wanted = same_name(name)
    near = exact or [i for i, choice in enumerate(choices) if same_name(choice) == wanted]
    return near[0] if len(near) == 1 else None


def _by_name(
    names: Sequence[str], found: Sequence[int | None], card: Card, what: str, ordered: bool
) -> tuple[list[int], str | None]:
    """Return the outputs of classes of which at least one is called like one of the network's."""
    ours = card.class_names or ()
    outputs = [number for number in found if number is not None]
    twice = [number for number, count in Counter(outputs).items() if count > 1]
    if twice:
        same = [name for name, number in zip(names, found, strict=True) if number == twice[0]]
        raise DreamkitError(
            f"{what}: {quoted(same)} are all called like the class '{ours[twice[0]]}' of "
            f"{card.name}; rename all but one"
        )
    strange = [name for name, number in zip(names, found, strict=True) if number is None]
    lacking = [name for number, name in enumerate(ours) if number not in outputs]
    if not strange:
        note = f"{what} has no images of {quoted(lacking)}" if lacking and not ordered else None
        return outputs, note
    stand = all(number is None or number == place for place, number in enumerate(found))
    if ordered and stand and len(names) == card.num_classes:
        place = names.index(strange[0])
        return list(range(len(names))), (
            f"{what}: {quoted(strange)} {_are(strange)} none of the classes of {card.name}: taken "
            f"by the order, '{strange[0]}' for '{ours[place]}'"
        )
    raise DreamkitError(
        f"{what}: {quoted(strange)} {_are(strange)} none of the classes of {card.name}"
        + (f", and its {quoted(lacking)} {_are(lacking)} not there" if lacking else "")
        + f"; {_MEND}"
    )


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _by_number(
    names: Sequence[str], numbers: Sequence[int], card: Card, what: str
) -> Matched | None:
    """Return classes that are called by the number of their output; None if one is out of range."""
    if max(numbers) >= card.num_classes:
        return None
    note = None
    if card.class_names:
        note = (
            f"{what}: the classes are taken by their numbers, 0 for '{card.class_names[0]}': none "
            f"is called like a class of {card.name}"
        )
    elif sorted(names) != sorted(names, key=int):
        note = (
            f"{what}: the classes are the outputs that their numbers say. A network that was "
            "trained on such folders in the order of text (0, 1, 10, 2, as torchvision's "
            "ImageFolder has them) needs them in that order under 'classes'"
        )
    return Matched(list(numbers), note)


def _by_synset(names: Sequence[str], card: Card, what: str) -> Matched | None:
    """Return some of ImageNet's classes, which are called n01440764 and so on."""
    if card.num_classes != _IMAGENET or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    from timm.data.imagenet_info import ImageNetInfo

    synsets: list[str] = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    if not set(names) <= set(synsets):
        return None
    return Matched(
        [synsets.index(name) for name in names],
        f"{what}: the classes are taken by ImageNet's synsets in their order, {names[0]} for "
        f"output {synsets.index(names[0])}: the outputs of {card.name} are believed to be "
        "ImageNet's",
    )


def _by_order(
    names: Sequence[str], whole: Sequence[str], card: Card, what: str, ordered: bool
) -> Matched:
    outputs = [whole.index(name) for name in names]
    if ordered and not card.class_names:  # nothing speaks against what somebody said
        return Matched(outputs)
    why = "do not tell" if card.class_names else "are not known to be the network's"
    first = f" ('{card.class_names[outputs[0]]}')" if card.class_names else ""
    note = (
        f"{what}: the order of the classes decides which output each is, for their names {why}: "
        f"'{names[0]}' is output {outputs[0]}{first}, '{names[-1]}' is {outputs[-1]}"
    )
    pairs = itertools.pairwise(whole)
    turned = [] if ordered else [pair for pair in pairs if _counted(pair[0]) > _counted(pair[1])]
    if turned:
        note += f". It is that of text: '{turned[0][0]}' comes before '{turned[0][1]}'"
    return Matched(outputs, note)


def _counted(name: str) -> list[tuple[str, int]]:
    """Return what sorts names by the numbers in them."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
