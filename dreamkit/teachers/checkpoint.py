"""Teachers from the user's own code and checkpoint."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.importing import import_file
from dreamkit.model_state import seeded, to_eval
from dreamkit.teachers.readying import made_ready
from dreamkit.teachers.weights import (
    check_file,
    hash_weights,
    load_into,
    read_state_dict,
)
from dreamkit.types import Teacher, TeacherSource


@dataclass(frozen=True)
class CheckpointTeacher(TeacherSource):
    """A model built by a function of yours, with weights from a checkpoint.

    The builder is your code and runs as such. The checkpoint is read with ``weights_only=True``.

    Args:
        builder: ``package.module:function`` or ``path/to/file.py:function``; returns a module.
        input_size: (channels, height, width).
        mean: per channel, of pixels in [0, 1], as in training.
        std: per channel, of pixels in [0, 1], as in training.
        num_classes: number of outputs.
        path: the checkpoint (.pth, .pt, .safetensors); null for random weights.
        key: dotted path to the state dict inside it, e.g. ``state_dict``.
        prefix: removed from the front of its keys, e.g. ``module.``.
        arguments: keyword arguments for the builder.
        class_names: in output order.
    """

    builder: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: Annotated[int, Field(ge=2)]
    path: str | None = None
    key: str | None = None
    prefix: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        module, colon, function = self.builder.rpartition(":")
        if not colon or not module or not function.isidentifier():
            raise OptionError("builder", "write package.module:function or path/file.py:function")
        if module.endswith(".py"):
            check_file("builder", module)
        if self.path is not None:
            check_file("path", self.path)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            given = len(self.class_names)
            raise OptionError("class_names", f"{given} names for {self.num_classes} classes")
        self._card("unchecked", None)

    def build(self) -> nn.Module:
        """Return the architecture with the builder's own initial weights."""
        return self._build(lambda text: None)

    def _build(self, note: Callable[[str], None]) -> nn.Module:
        try:
            model = import_builder(self.builder)(**self.arguments)
        except DreamkitError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise DreamkitError(
                f"the builder {self.builder} failed: {type(error).__name__}: {error}",
                ("builder",),
            ) from error
        if not isinstance(model, nn.Module):
            made = type(model).__name__
            raise DreamkitError(
                f"the builder {self.builder} returned {made}, not a module", ("builder",)
            )
        # A copy: a builder may return one object whenever it is called.
        return made_ready(model, self.input_size, note, "its network")

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        notes: list[str] = []
        with seeded(seed):
            model = self._build(notes.append)
        if self.path is not None:
            load_into(model, read_state_dict(self.path, self.key, self.prefix), self.path)
        card = self._card(self.path or "random weights", hash_weights(model))
        builder = dataclasses.asdict(self) | {"source": "checkpoint", "path": None}
        to_eval(model)
        return Teacher(model, card, builder, notes=tuple(notes))

    def _card(self, origin: str, weights_sha256: str | None) -> Card:
        return Card(
            name=f"checkpoint/{self.builder}",
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            num_classes=self.num_classes,
            class_names=self.class_names,
            origin=origin,
            trained=self.path is not None,
            weights_sha256=weights_sha256,
        )


def import_builder(reference: str) -> Callable[..., Any]:
    """Import ``package.module:function`` or ``path/file.py:function``.

    Raises:
        DreamkitError: there is no such module, file or function.
    """
    place, _, name = reference.rpartition(":")
    try:
        module = import_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # importing runs the user's code
        raise DreamkitError(
            f"the builder's module {place} cannot be imported: {type(error).__name__}: {error}",
            ("builder",),
        ) from error
    if not callable(getattr(module, name, None)):
        raise DreamkitError(f"{place} has no function '{name}'", ("builder",))
    function: Callable[..., Any] = getattr(module, name)
    return function
