"""Networks by name."""

from __future__ import annotations

from typing import Literal

from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.teachers.named import load_named
from dreamkit.teachers.provenance import tell
from dreamkit.types import Teacher


def load_teacher(name: str, weights: Literal["default"] | None = "default") -> Teacher:
    """Load a trained network with its card, from where recipes get theirs.

    Args:
        name: ``SOURCE:MODEL``, e.g. ``timm:resnet18.a1_in1k``, ``torchvision:resnet50``,
            ``bundled:digits_resnet8``.
        weights: ``default``, or None for random ones, for which nothing is downloaded.

    Returns:
        The network (``.model``, in eval mode, on the CPU) and its card (``.card``). Every function
        of the library takes it in place of the network alone.

    Raises:
        DreamkitError: there is no such network, or its weights cannot be had.
    """
    if weights not in {"default", None} or isinstance(weights, bool):
        raise DreamkitError(
            f"weights: should be 'default', or None for random ones (got {weights!r}); others are "
            "part of the name, e.g. timm:resnet18.a1_in1k"
        )
    found = load_named(build_registries(), "name", name, "null" if weights is None else weights)
    if weights is None and found.card.trained:
        raise DreamkitError(f"weights: {name} has none but its own; leave 'weights' out")
    # So that its model alone can be given too.
    tell(found.model, found.card, found.builder, found.pruning_record)
    return found
