"""A model's card: what is known of it besides its weights, and how it sees images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor


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
