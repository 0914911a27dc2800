"""What a network in memory tells of itself: its card, its builder, and what was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dreamkit.card import Card
from dreamkit.model_state import tensors_of
from dreamkit.types import Teacher


def tell(model: nn.Module, card: Card, builder: dict[str, Any], record: dict[str, Any]) -> None:
    """Let a network tell where it comes from, wherever it goes.

    Args:
        model: gets the attributes ``card`` and ``provenance``.
        card: its own.
        builder: the recipe entry that builds it, unweighted.
        record: what was pruned of what that builds.
    """
    model.card = card  # type: ignore[assignment]
    model.provenance = {  # type: ignore[assignment]
        "builder": builder,
        "pruning_record": record,
        "layout": _layout(model),
    }


def told(model: nn.Module, card: Card) -> Teacher | None:
    """Return a network with what it tells; None if it tells nothing, or was changed since.

    Args:
        model: the network.
        card: as it is now.
    """
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Mapping) or provenance.get("layout") != _layout(model):
        return None
    return Teacher(model, card, dict(provenance["builder"]), dict(provenance["pruning_record"]))


def _layout(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
