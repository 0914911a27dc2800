"""Teachers from the user's own code and checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import OptionError
from dreamkit.model_state import seeded, to_eval
from dreamkit.teachers.builders import (
    call_builder,
    check_builder,
    origin_of,
    reference_from_anywhere,
)
from dreamkit.teachers.class_names import names_of_classes
from dreamkit.teachers.readying import made_ready
from dreamkit.teachers.weights import check_weights, hash_weights, load_file
from dreamkit.types import Teacher, TeacherSource


@dataclass(frozen=True)
class CheckpointTeacher(TeacherSource):
    """A model built by a function of yours, with weights from a checkpoint.

    The builder is your code and runs as such. Nothing of the checkpoint is run: only tensors,
    numbers and texts are read from it.

    Args:
        builder: ``package.module:function`` or ``path/to/file.py:function``; returns a module.
        input_size: (channels, height, width).
        mean: per channel, of pixels in [0, 1], as in training.
        std: per channel, of pixels in [0, 1], as in training.
        num_classes: number of outputs.
        path: the checkpoint, of ``torch.save`` or safetensors; null for the weights that the
            builder returns, which may be trained or random.
        key: dotted path to the state dict inside it, e.g. ``state_dict``; not needed where one
            alone fits.
        prefix: removed from the front of its keys, e.g. ``model.``; ``module.`` and what they all
            have in common need not be told.
        arguments: keyword arguments for the builder.
        class_names: in output order; or a text file with one a line, or a JSON file.
    """

    builder: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: Annotated[int, Field(ge=1)]
    path: str | None = None
    key: str | None = None
    prefix: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str | int, ...] | str | None = None

    def __post_init__(self) -> None:
        check_builder(self.builder)
        if self.path is not None:
            check_weights("path", self.path)
        if self.num_classes == 1:
            raise OptionError(
                "num_classes",
                "should be at least 2: for a network of one logit x (its sigmoid the probability "
                "of the second class) return two in the builder's forward, "
                "torch.cat([-x, x], 1) / 2, and write num_classes: 2",
            )
        names_of_classes(self.class_names, self.num_classes)
        self._card("unchecked")

    def build(self) -> nn.Module:
        """Return the architecture with the builder's own weights."""
        return self._build(lambda text: None)

    def _build(self, note: Callable[[str], None]) -> nn.Module:
        model = call_builder(self.builder, self.arguments)
        # A copy: a builder may return one object whenever it is called.
        return made_ready(model, self.input_size, note, "its network")

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        notes: list[str] = []
        with seeded(seed):
            model = self._build(notes.append)
        if self.path is not None:
            notes += load_file(model, self.path, self.key, self.prefix)
            card = self._card(self.path, trained=True)
        else:
            with seeded(seed + 1):
                origin = origin_of(model, self.build(), self.input_size)
            notes += origin.said
            card = self._card(origin.text, origin.trained)
        card = dataclasses.replace(card, weights_sha256=hash_weights(model))
        # A student of it is built from anywhere, and has its weights in a file of its own.
        builder = dataclasses.asdict(self) | {"source": "checkpoint", "path": None}
        builder |= {"builder": reference_from_anywhere(self.builder), "key": None, "prefix": ""}
        builder |= {"class_names": card.class_names}
        to_eval(model)
        return Teacher(model, card, builder, notes=tuple(notes))

    def _card(self, origin: str, trained: bool = False) -> Card:
        return Card(
            name=f"checkpoint/{self.builder}",
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            num_classes=self.num_classes,
            class_names=names_of_classes(self.class_names, self.num_classes),
            origin=origin,
            trained=trained,
        )
