"""A model's card: what is known of it besides its weights, and how it sees images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dreamkit.errors import DreamkitError


@dataclass(frozen=True)
class Card:
    """What is known of a trained model besides its weights.

    Args:
        name: for people, e.g. ``torchvision/resnet50``.
        input_size: (channels, height, width).
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        num_classes: number of outputs.
        origin: where the weights came from.
        trained: False for random weights.
        weights_sha256: hash over the state dict, None before it is known.
        class_names: in output order, where known.
        notes: anything else worth keeping, e.g. accuracy and training command.
    """

    name: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    origin: str
    trained: bool = True
    weights_sha256: str | None = None
    class_names: tuple[str, ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean and std need one value for each of the {channels} input channels "
                f"(got {len(self.mean)} and {len(self.std)})"
            )
        if min(self.input_size) < 1:
            raise ValueError(f"input_size should be at least 1 everywhere (got {self.input_size})")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std should be finite (got {self.mean} and {self.std})")
        if min(self.std) <= 0:
            raise ValueError(f"std should be greater than 0 (got {self.std})")

    def _per_channel(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, device=like.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=like.device).view(1, -1, 1, 1)
        return mean, std

    def normalise(self, stored: Tensor) -> Tensor:
        """Turn stored images (uint8) into normalised ones (float32)."""
        mean, std = self._per_channel(stored)
        return (stored.float() / 255 - mean) / std

    def to_stored(self, images: Tensor) -> Tensor:
        """Turn normalised images into stored ones: clipped to the valid range and rounded."""
        mean, std = self._per_channel(images)
        pixels = (images.float() * std + mean).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8)

    def pixel_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return what pixels 0 and 1 become, normalised; each of shape (1, C, 1, 1)."""
        mean, std = self._per_channel(like)
        return -mean / std, (1 - mean) / std

    def doubts(self) -> tuple[str, ...]:
        """Return what is likely to be wrong with it, each with what to write; empty for nothing."""
        if max(self.mean) <= 1 and max(self.std) <= 1:
            return ()
        mean = self.mean if max(self.mean) <= 1 else _divided(self.mean)
        std = self.std if max(self.std) < 1 else _divided(self.std)
        return (
            f"mean {list(self.mean)} and std {list(self.std)} look like those of pixels in "
            f"[0, 255], and are taken as they stand; pixels are in [0, 1] here: write mean "
            f"{list(mean)} and std {list(std)}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON-safe data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Card:
        """Read a card written by ``to_json``.

        Raises:
            ValueError: it is none.
        """
        unknown = set(data) - {known.name for known in fields(Card)}
        if unknown:
            raise ValueError(f"a card has no {', '.join(sorted(map(str, unknown)))}")
        return _CARDS.validate_python(data)


_CARDS = TypeAdapter(Card)


def _divided(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(f"{value / 255:.4g}") for value in values)


def read_class_names(given: Sequence[str | int] | Path | None) -> tuple[str, ...] | None:
    """Return the names of classes in output order, as they are given or as a file has them.

    Args:
        given: the names; or the path of a text file with one a line, or of a JSON file with a list
            of names, names by number (as ``{"0": "tench"}``) or numbers by name; None for none. A
            text is a path.

    Raises:
        DreamkitError: the file cannot be read, or does not name classes 0, 1, 2 and so on.
    """
    if given is None or not isinstance(given, str | Path):
        return None if given is None else tuple(str(name) for name in given)
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8-sig")
        found = _from_json(json.loads(text)) if text.lstrip()[:1] in {"[", "{"} else None
    except OSError as error:
        raise DreamkitError(
            f"the file of names {given} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:  # of the encoding or of JSON too
        raise DreamkitError(f"the file of names {given} cannot be read: {error}") from error
    names = tuple(line.strip() for line in text.strip().splitlines()) if found is None else found
    if not names or "" in names:
        lacking = names.index("") + 1 if names else 1
        raise DreamkitError(f"the file of names {given} has no name in line {lacking}")
    return names


def _from_json(data: Any) -> tuple[str, ...]:
    """Return names in order.

    Raises:
        ValueError: the data does not tell them.
    """
    if isinstance(data, Mapping):
        data = data.get("id2label", data)  # of a configuration of Hugging Face's
        turned = all(isinstance(value, int) for value in data.values())
        named = {int(n): name for name, n in data.items()} if turned else data
        numbered = {int(number): name for number, name in named.items()}
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError("its numbers are not 0, 1, 2 and so on, each once")
        data = [numbered[number] for number in range(len(numbered))]
    # ImageNet's index has a pair for each class: its synset and its name.
    names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in data]
    if not all(isinstance(name, str | int) for name in names):
        raise ValueError("it is no list of names, and no names by number")
    return tuple(str(name) for name in names)
