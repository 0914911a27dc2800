"""Teachers and students for small images: the networks that papers on CIFAR use."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import OptionError, did_you_mean
from dreamkit.model_state import seeded
from dreamkit.teachers.cifar_networks import NETWORKS, build_network
from dreamkit.teachers.class_names import names_of_classes
from dreamkit.teachers.weights import (
    check_weights,
    hash_weights,
    is_weights_file,
    load_file,
)
from dreamkit.types import Teacher, TeacherSource

SIZE = (3, 32, 32)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def _named_alike(state: dict[str, Any]) -> dict[str, Any]:
    """Call the classifier ``fc``, which most others who publish CIFAR ResNets call ``linear``."""
    return {re.sub(r"(^|\.)linear\.", r"\1fc.", name): value for name, value in state.items()}


@dataclass(frozen=True)
class CifarTeacher(TeacherSource):
    """A network for 32×32 images, random or with weights from a file.

    ResNet-20, -32 and -56 are those of He et al. 2016, section 4.2, with shortcuts padded by zeros
    (option A). ResNet-18 and -34 are the ImageNet ones with a 3×3 stem of stride 1 and no max
    pooling, VGG-11 has one linear layer, MobileNetV2 two stages less of downsampling. WRN-d-k are
    Zagoruyko and Komodakis 2016. The vision transformer and the ConvNeXt are timm's, have patches
    of four pixels, and no BatchNorm.

    A JSON card of the same name beside the weights, as ``benchmarks/train_teacher.py`` writes it,
    fills in every option that is not given.

    Args:
        model: resnet20, resnet32, resnet56, resnet18, resnet18_half, resnet34, vgg11_bn, wrn_40_2,
            wrn_40_1, wrn_16_1, wrn_16_2, mobilenetv2, vit or convnext.
        weights: the path of a file, or null for random weights.
        key: dotted path to the state dict inside the file, e.g. ``state_dict``.
        prefix: removed from the front of its keys, e.g. ``module.``.
        num_classes: number of outputs; 10 where no card tells.
        input_size: (channels, height, width); (3, 32, 32) where no card tells.
        mean: per channel, of pixels in [0, 1]; CIFAR-10's where no card tells.
        std: per channel, of pixels in [0, 1]; CIFAR-10's where no card tells.
        class_names: in output order; or a text file with one a line, or a JSON file.
    """

    model: str
    weights: str | None = None
    key: str | None = None
    prefix: str = ""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str | int, ...] | str | None = None

    def __post_init__(self) -> None:
        if self.model not in NETWORKS:
            hint = did_you_mean(self.model, NETWORKS)
            choices = ", ".join(NETWORKS)
            raise OptionError("model", f"no network '{self.model}'{hint} (choices: {choices})")
        if self.weights is not None:
            if not is_weights_file(self.weights):
                raise OptionError(
                    "weights",
                    f"'{self.weights}' is no path of a file; none are published, "
                    "benchmarks/train_teacher.py makes them; null for random ones",
                )
            check_weights("weights", self.weights)
        self._card(self._written(), "unchecked", None)

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str]:
        """Return every network; none comes with weights."""
        return [] if pretrained else list(NETWORKS)

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""
        card = self._card(self._written(), "random weights", None)
        return build_network(self.model, card.num_classes, card.input_size[0])

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        with seeded(seed):
            model = self.build()
        said: list[str] = []
        if self.weights is not None:
            said = load_file(model, self.weights, self.key, self.prefix, _named_alike)
        origin = self.weights or "random weights"
        card = self._card(self._written(), origin, hash_weights(model))
        resolved = {
            key: getattr(card, key)
            for key in ("num_classes", "input_size", "mean", "std", "class_names")
        }
        builder = {"source": "cifar", "model": self.model} | resolved
        return Teacher(model.eval(), card, builder, notes=tuple(said))

    def _written(self) -> dict[str, Any]:
        """Return the card that lies beside the weights; empty if there is none."""
        path = Path(self.weights).with_suffix(".json") if self.weights else None
        if path is None or not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            model, card = content["architecture"]["model"], Card.from_json(content["card"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                "weights",
                f"{path} cannot be read as the card of these weights ({error}): mend it, or move "
                "it away and give num_classes, mean and std here",
            ) from error
        if model != self.model:
            raise OptionError("model", f"{path} says that its weights are of '{model}'")
        return dataclasses.asdict(card)

    def _card(self, written: dict[str, Any], origin: str, weights_sha256: str | None) -> Card:
        default: dict[str, Any] = {
            "input_size": SIZE,
            "mean": CIFAR10_MEAN,
            "std": CIFAR10_STD,
            "num_classes": 10,
            "origin": origin,
        }
        given = {
            key: getattr(self, key)
            for key in ("num_classes", "input_size", "mean", "std", "class_names")
            if getattr(self, key) is not None
        }
        fixed = {
            "name": f"cifar/{self.model}",
            "trained": self.weights is not None,
            "weights_sha256": weights_sha256,
        }
        options = default | written | given | fixed
        names = names_of_classes(options.get("class_names"), options["num_classes"])
        return Card(**(options | {"class_names": names}))
