"""A caller's network, taken in: what it sees and returns, and how it is built anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.recognising import MEMORY, builder_of, stated
from dreamkit.card import Card, read_class_names
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.teachers.intake import examine, take_logits
from dreamkit.teachers.provenance import told as told_by
from dreamkit.teachers.readying import made_ready, unwrapped
from dreamkit.teachers.weights import hash_weights
from dreamkit.types import Teacher, TeacherSource

IN_MEMORY = "a network in memory"
"""Where weights come from that nobody else has."""


@dataclass(frozen=True)
class View:
    """What a caller says of how a network sees images; None is left to what the network tells.

    Args:
        size: (channels, height, width).
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        class_names: in output order, or a file of them.
    """

    size: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[str] | Path | None = None


@dataclass(frozen=True)
class GivenNetwork(TeacherSource):
    """A network in memory where an entry of ``teachers`` is expected.

    Args:
        teacher: is copied whenever it is loaded.
        weights: whether a recipe is told of its weights, beside its architecture.
    """

    teacher: Teacher
    weights: bool = True

    def build(self) -> nn.Module:
        """Return a copy of the network, weights and all."""
        return copied(self.teacher.model)

    def load(self, seed: int) -> Teacher:
        """Return a copy of the network."""
        return dataclasses.replace(self.teacher, model=self.build())

    def entry(self) -> dict[str, Any]:
        """Return the entry that a recipe has of it."""
        return recipe_entry(self.teacher, self.weights)


def recipe_entry(teacher: Teacher, weights: bool = True) -> dict[str, Any]:
    """Return a recipe's entry of a network; of one in memory, with what is to be filled in.

    Args:
        teacher: the network.
        weights: false for its architecture alone, with random ones.
    """
    builder, card = teacher.builder, teacher.card
    unweighted: dict[str, Any] = {} if weights else {"weights": None}
    if teacher.pruning_record:
        return {"source": "student", "path": "path/to/saved_student", **unweighted}
    if builder.get("source") != MEMORY and (card.origin != IN_MEMORY or not weights):
        return {key: value for key, value in builder.items() if key != "weights"} | unweighted
    return {
        "source": "checkpoint",
        "builder": "path/to/your_file.py:function_that_returns_the_network",
        "path": "path/to/weights.pth" if weights else None,
        "input_size": list(card.input_size),
        "mean": list(card.mean),
        "std": list(card.std),
        "num_classes": card.num_classes,
    }


def take_in(
    network: nn.Module | Teacher,
    view: View,
    note: Callable[[str], None],
    role: str = "model",
    otherwise: Card | None = None,
    judge: bool = False,
) -> Teacher:
    """Return a copy of a network in eval mode, with its card and builder.

    Args:
        network: left as it is.
        view: what the caller says of it.
        note: told what of it was put right, and what is doubtful.
        role: what it is called in messages.
        otherwise: how it sees images where neither the caller nor the network tells.
        judge: as of ``admit``.

    Raises:
        DreamkitError: something of the card is not known, or the network does not fit it.
    """
    model = network.model if isinstance(network, Teacher) else network
    if not isinstance(model, nn.Module):
        raise DreamkitError(
            f"{role}: should be a torch.nn.Module, not {type(model).__name__}; "
            "dreamkit.load_teacher and dreamkit.load_student return one"
        )
    model = unwrapped(model)
    told = network.card if isinstance(network, Teacher) else getattr(model, "card", None)
    told = told if isinstance(told, Card) else None
    known = _view_of(told) if told else {**_view_of(otherwise), **stated(model)}
    known |= _said(view)
    size = _size(model, known, role)
    own = made_ready(model, size, note, role)
    names = _names(view.class_names)
    likely = told.num_classes if told else None if names is None else len(names)
    classes = (take_logits if judge else examine)(own, size, None, note, role, likely)
    card = _card(own, told, view, known, classes, role)
    for text in card.doubts():
        note(f"{role}: {text}")
    if isinstance(network, Teacher):
        made = dataclasses.replace(network, model=own, card=card)
    else:
        made = told_by(own, card) or Teacher(own, card, builder_of(own, card))
    return made


def _said(view: View) -> dict[str, Any]:
    """Return what a caller says of size, mean and std."""
    said = {"size": view.size, "mean": view.mean, "std": view.std}
    return {name: value for name, value in said.items() if value is not None}


def _size(model: nn.Module, known: Mapping[str, Any], role: str) -> tuple[int, int, int]:
    """Return (channels, height, width), once it is known how a network sees images."""
    lacking = [name for name in ("size", "mean", "std") if name not in known]
    if lacking:
        raise DreamkitError(
            f"{role}: {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not known of "
            f"{type(model).__name__}. Give size=(channels, height, width), and mean= and std= as "
            "your training normalised pixels in [0, 1], e.g. mean=(0.485, 0.456, 0.406), "
            "std=(0.229, 0.224, 0.225)"
        )
    sides = _numbers("size", known["size"])
    if len(sides) != 3 or not all(side >= 1 and side.is_integer() for side in sides):
        raise DreamkitError(
            "size: should be (channels, height, width), whole numbers of 1 or more (got "
            f"{known['size']})"
        )
    channels, height, width = map(int, sides)
    if channels > 4 >= width:
        raise DreamkitError(f"size: channels come first: write {(width, channels, height)}")
    return channels, height, width


def _card(
    model: nn.Module,
    told: Card | None,
    view: View,
    known: Mapping[str, Any],
    classes: int,
    role: str,
) -> Card:
    names = _names(view.class_names) if told is None or view.class_names else told.class_names
    try:
        card = Card(
            name=told.name if told else type(model).__name__,
            input_size=_size(model, known, role),
            mean=_numbers("mean", known["mean"]),
            std=_numbers("std", known["std"]),
            num_classes=classes,
            origin=told.origin if told else IN_MEMORY,
            trained=told.trained if told else True,
            weights_sha256=hash_weights(model),
            class_names=names,
            notes=told.notes if told else {},
        )
    except ValueError as error:
        raise DreamkitError(f"{role}: {error}") from error
    if card.class_names is not None and len(card.class_names) != card.num_classes:
        raise DreamkitError(
            f"class_names: {len(card.class_names)} names for {card.num_classes} outputs"
        )
    return card


def _view_of(card: Card | None) -> dict[str, Any]:
    return {} if card is None else {"size": card.input_size, "mean": card.mean, "std": card.std}


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    """Return a sequence of numbers, whatever kind of sequence it is."""
    try:
        return tuple(float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise DreamkitError(
            f"{name}: should be several numbers, such as "
            f"{'(3, 224, 224)' if name == 'size' else '(0.5, 0.5, 0.5)'} (got {given!r})"
        ) from error


def _names(given: Sequence[str] | Path | None) -> tuple[str, ...] | None:
    if isinstance(given, str) and not Path(given).expanduser().is_file():
        raise DreamkitError(
            f"class_names: should be several names, or a file of them (got {given!r})"
        )
    try:
        return read_class_names(given)
    except DreamkitError as error:
        raise DreamkitError(f"class_names: {error}") from error
