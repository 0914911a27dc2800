"""Teachers from torchvision."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from torchvision import models

from dreamkit.card import Card
from dreamkit.errors import OptionError, did_you_mean
from dreamkit.model_state import seeded
from dreamkit.teachers.weights import (
    check_weights,
    download,
    hash_weights,
    is_weights_file,
    load_file,
)
from dreamkit.types import Teacher, TeacherSource

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_AUXILIARY = {
    "googlenet": re.compile(r"(^|\.)aux[12]\."),
    "inception_v3": re.compile(r"(^|\.)AuxLogits\."),
}
"""Heads for training only: the published weights have them, the models here do not."""


@dataclass(frozen=True)
class TorchvisionTeacher(TeacherSource):
    """Any torchvision classifier; size, mean, std and classes come with its weights' metadata.

    Args:
        model: a name of ``torchvision.models.list_models()``.
        weights: ``default``, a name of the model's weights such as ``IMAGENET1K_V2``, the path of
            a file, or null for random weights.
        num_classes: outputs of a model whose weights are a file or random.
        input_size: (channels, height, width), where it is not the one torchvision states.
    """

    model: str
    weights: str | None = "default"
    num_classes: Annotated[int, Field(ge=2)] | None = None
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        names = models.list_models(module=models)
        if self.model not in names:
            hint = did_you_mean(self.model, names)
            raise OptionError("model", f"torchvision has no classifier '{self.model}'{hint}")
        if self.input_size is not None and self.input_size[0] != 3:
            raise OptionError("input_size", "torchvision's models take 3 channels; timm's take any")
        if is_weights_file(self.weights):
            check_weights("weights", str(self.weights))
        elif self.weights is not None:
            if self.num_classes is not None:
                raise OptionError("num_classes", "only for weights from a file or null")
            self._check_weights_name(self.weights)

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str]:
        """Return every classifier; all of them have weights."""
        names: list[str] = models.list_models(module=models)
        return names

    def _check_weights_name(self, name: str) -> None:
        known = ["default", *models.get_model_weights(self.model).__members__]
        if name not in known:
            hint = did_you_mean(name, known)
            choices = ", ".join(known)
            raise OptionError(
                "weights", f"no weights '{name}'{hint} (choices: {choices}, the path of a file)"
            )

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""
        return self._create(None)

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        origin = f"torchvision/{self.model}.{self.weights}"
        if self.weights is None or is_weights_file(self.weights):
            with seeded(seed):
                model = self.build()
        else:
            name = self.weights.upper() if self.weights == "default" else self.weights
            model = download(origin, lambda: self._create(name))
        said: list[str] = []
        if is_weights_file(self.weights):
            said = load_file(model, str(self.weights), renamed=self._without_auxiliary)
            origin = str(self.weights)
        card = self._card(model, "random weights" if self.weights is None else origin)
        builder = dataclasses.asdict(self) | {"source": "torchvision", "weights": None}
        return Teacher(model.eval(), card, builder, notes=tuple(said))

    def _without_auxiliary(self, state: dict[str, Any]) -> dict[str, Any]:
        heads = _AUXILIARY.get(self.model)
        return state if heads is None else {k: v for k, v in state.items() if not heads.search(k)}

    def _create(self, weights: str | None) -> nn.Module:
        options: dict[str, Any] = {}
        if self.num_classes is not None:
            options["num_classes"] = self.num_classes
        if self.model in _AUXILIARY:
            # No training heads; and the input scaling that torchvision switches on with its
            # weights, which a student rebuilt without them needs just the same.
            options |= {"aux_logits": False, "transform_input": True}
            if weights is None:
                options["init_weights"] = False  # drawing truncated normals takes a minute
        model: nn.Module = models.get_model(self.model, weights=weights, **options)
        return model

    def _card(self, model: nn.Module, origin: str) -> Card:
        named = self.weights is not None and not is_weights_file(self.weights)
        choices = models.get_model_weights(self.model)
        entry = (
            choices[str(self.weights)] if named and self.weights != "default" else choices.DEFAULT
        )
        preset = entry.transforms()
        crop = preset.crop_size[0]
        categories = tuple(entry.meta["categories"])
        num_classes = self.num_classes or len(categories)
        return Card(
            name=f"torchvision/{self.model}",
            input_size=self.input_size or (3, crop, crop),
            mean=tuple(getattr(preset, "mean", _IMAGENET_MEAN)),
            std=tuple(getattr(preset, "std", _IMAGENET_STD)),
            num_classes=num_classes,
            class_names=categories if num_classes == len(categories) else None,
            origin=origin,
            trained=self.weights is not None,
            weights_sha256=hash_weights(model),
        )
