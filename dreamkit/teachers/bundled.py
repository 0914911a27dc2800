"""Teachers whose weights ship in the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import safetensors.torch
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import OptionError, did_you_mean
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.teachers.weights import hash_weights, load_into
from dreamkit.teachers.without_batch_norm import convnext, vision_transformer
from dreamkit.types import Teacher, TeacherSource


@dataclass(frozen=True)
class BundledTeacher(TeacherSource):
    """A small trained model that ships with dreamkit: nothing is downloaded.

    Args:
        model: its name, e.g. ``digits_resnet8``.
    """

    model: str

    def __post_init__(self) -> None:
        names = self.known_models(pretrained=True)
        if self.model not in names:
            hint = did_you_mean(self.model, names)
            raise OptionError("model", f"no bundled '{self.model}'{hint} ({', '.join(names)})")

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str]:
        """Return what ships; all of it has weights."""
        folder = resources.files("dreamkit.teachers") / "weights"
        return sorted(
            file.name.removesuffix(".json")
            for file in folder.iterdir()
            if file.name.endswith(".json")
        )

    def _file(self, suffix: str) -> bytes:
        return (
            resources.files("dreamkit.teachers") / "weights" / f"{self.model}{suffix}"
        ).read_bytes()

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""
        return build_bundled(json.loads(self._file(".json"))["architecture"])

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        model = self.build()
        load_into(
            model, safetensors.torch.load(self._file(".safetensors")), f"bundled {self.model}"
        )
        card = Card.from_json(
            json.loads(self._file(".json"))["card"] | {"weights_sha256": hash_weights(model)}
        )
        return Teacher(model.eval(), card, {"source": "bundled", "model": self.model})


def build_bundled(architecture: Mapping[str, Any]) -> nn.Module:
    """Return the network of random weights that a bundled teacher's file describes.

    Args:
        architecture: what it is built with; ``model``, one of the ``cifar`` source's, or ``kind``
            says which, and neither is a small ResNet.
    """
    options = dict(architecture)
    if "model" in options:
        return build_network(**options)
    return _KINDS[options.pop("kind", "small_resnet")](**options)


_KINDS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"small_resnet": SmallResNet, "vit": vision_transformer, "convnext": convnext}
)
