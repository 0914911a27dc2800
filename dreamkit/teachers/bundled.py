"""Teachers whose weights ship in the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

import safetensors.torch
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import OptionError, did_you_mean
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.teachers.weights import hash_weights, load_into
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
        architecture = json.loads(self._file(".json"))["architecture"]
        if "model" in architecture:
            return build_network(**architecture)
        return SmallResNet(**architecture)

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
