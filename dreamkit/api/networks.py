"""A caller's network, taken in: what it sees and returns, and how it is built anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dreamkit.card import Card, read_class_names
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.model_state import tensors_of
from dreamkit.teachers.intake import examine, take_logits
from dreamkit.teachers.provenance import told as told_by
from dreamkit.teachers.readying import made_ready, unwrapped
from dreamkit.teachers.timm import TimmTeacher
from dreamkit.teachers.torchvision import TorchvisionTeacher
from dreamkit.teachers.weights import hash_weights
from dreamkit.types import Teacher, TeacherSource

MEMORY = "memory"
"""Source of a builder that is in the caller's program alone."""
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
    stated = _view_of(told) if told else {**_view_of(otherwise), **_stated(model)}
    size = _size(model, {**stated, **_said(view)}, role)
    own = made_ready(model, size, note, role)
    classes = (take_logits if judge else examine)(own, size, None, note, role)
    card = _card(own, told, view, {**stated, **_said(view)}, classes, role)
    for text in card.doubts():
        note(f"{role}: {text}")
    if isinstance(network, Teacher):
        made = dataclasses.replace(network, model=own, card=card)
    else:
        made = told_by(own, card) or Teacher(own, card, builder_of(own, card.num_classes))
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
    sides = tuple(int(side) for side in _numbers("size", known["size"]))
    if len(sides) != 3:
        raise DreamkitError(f"size: should be (channels, height, width) (got {sides})")
    return sides[0], sides[1], sides[2]


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


def _stated(model: nn.Module) -> dict[str, Any]:
    """Return what timm's and torchvision's networks tell of how they see images."""
    stated = getattr(model, "pretrained_cfg", None)
    if isinstance(stated, Mapping) and {"input_size", "mean", "std"} <= set(stated):
        return {"size": stated["input_size"], "mean": stated["mean"], "std": stated["std"]}
    return _stated_by_torchvision(model)


def _torchvision_names(model: nn.Module) -> list[str]:
    """Return torchvision's builders in the module that a network's class comes from."""
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return []
    names: list[str] = torchvision.models.list_models()
    return [n for n in names if torchvision.models.get_model_builder(n).__module__ == module]


def _stated_by_torchvision(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing that all weights of a network's family share; else nothing."""
    found = set()
    for name in _torchvision_names(model):
        for weights in torchvision.models.get_model_weights(name):
            transforms = weights.transforms()
            if not hasattr(transforms, "crop_size"):
                return {}
            crop = tuple(transforms.crop_size)
            found.add((crop * 2 if len(crop) == 1 else crop, *map(tuple, _normal(transforms))))
    sizes = {size for size, _, _ in found}
    normal = {(mean, std) for _, mean, std in found}
    told: dict[str, Any] = {}
    if len(sizes) == 1:
        told["size"] = (3, *sizes.pop())
    if len(normal) == 1:
        told["mean"], told["std"] = normal.pop()
    return told


def _normal(transforms: Any) -> tuple[list[float], list[float]]:
    return transforms.mean, transforms.std


def builder_of(model: nn.Module, classes: int) -> dict[str, Any]:
    """Return the recipe entry that builds a network's architecture, without its weights.

    It is told by the shapes of its parameters and buffers. A network that neither timm nor
    torchvision builds has its class there, for the message that asks for a builder.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    stated = getattr(model, "pretrained_cfg", None)
    if isinstance(stated, Mapping) and isinstance(stated.get("architecture"), str):
        channels = next((p.shape[1] for p in model.parameters() if p.dim() == 4), 3)
        entry: dict[str, Any] = {"model": stated["architecture"], "num_classes": classes}
        size = [channels, *stated["input_size"][1:]]
        entry |= {} if channels == 3 else {"input_size": tuple(size)}
        if _builds(TimmTeacher(weights=None, **entry), shapes):
            return {"source": "timm", "weights": None, **entry}
    for name in _torchvision_names(model):
        entry = {"model": name} | ({} if classes == 1000 else {"num_classes": classes})
        if _builds(TorchvisionTeacher(weights=None, **entry), shapes):
            return {"source": "torchvision", "weights": None, **entry}
    kind = type(model)
    return {"source": MEMORY, "class": f"{kind.__module__}.{kind.__qualname__}"}


def _builds(source: TeacherSource, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a source's architecture has parameters and buffers of these names and shapes."""
    try:
        with torch.device("meta"):
            built = source.build()
    except Exception:  # options that this architecture does not take
        return False
    return {name: tuple(t.shape) for name, t in tensors_of(built).items()} == dict(shapes)
