"""Recognising timm's and torchvision's networks: how they see images, and what builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.model_state import device_of, load_state, seeded, tensors_of, to_eval
from dreamkit.teachers.logits import logits_in
from dreamkit.teachers.timm import TimmTeacher
from dreamkit.teachers.torchvision import TorchvisionTeacher
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import TeacherSource

MEMORY = "memory"
"""Source of a builder that is in the caller's program alone."""


def stated(model: nn.Module) -> dict[str, Any]:
    """Return what timm's and torchvision's networks tell of how they see images."""
    told = getattr(model, "pretrained_cfg", None)
    if isinstance(told, Mapping) and {"input_size", "mean", "std"} <= set(told):
        return {"size": told["input_size"], "mean": told["mean"], "std": told["std"]}
    return _stated_by_torchvision(model)


def _torchvision_names(model: nn.Module) -> list[str]:
    """Return torchvision's builders in the module that a network's class comes from."""
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return []
    names: list[str] = torchvision.models.list_models()
    return [n for n in names if torchvision.models.get_model_builder(n).__module__ == module]


def _stated_by_torchvision(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing that all weights of a network's family share; else nothing."""
    found = set()
    for name in _torchvision_names(model):
        for weights in torchvision.models.get_model_weights(name):
            transforms = weights.transforms()
            if not hasattr(transforms, "crop_size"):
                return {}
            crop = tuple(transforms.crop_size)
            found.add((crop * 2 if len(crop) == 1 else crop, *map(tuple, _normal(transforms))))
    sizes = {size for size, _, _ in found}
    normal = {(mean, std) for _, mean, std in found}
    told: dict[str, Any] = {}
    if len(sizes) == 1:
        told["size"] = (3, *sizes.pop())
    if len(normal) == 1:
        told["mean"], told["std"] = normal.pop()
    return told


def _normal(transforms: Any) -> tuple[list[float], list[float]]:
    return transforms.mean, transforms.std


def builder_of(model: nn.Module, card: Card) -> dict[str, Any]:
    """Return the recipe entry that builds a network's architecture, without its weights.

    It is told by the shapes of its parameters and buffers, and with its weights it has to do what
    the network does: activations and strides have no weights. A network that neither timm nor
    torchvision builds has its class there, for the message that asks for a builder.

    Args:
        model: in eval mode; returns logits.
        card: its own.
    """
    classes = card.num_classes
    told = getattr(model, "pretrained_cfg", None)
    if isinstance(told, Mapping) and isinstance(told.get("architecture"), str):
        channels = next((p.shape[1] for p in model.parameters() if p.dim() == 4), 3)
        entry: dict[str, Any] = {"model": told["architecture"], "num_classes": classes}
        size = [channels, *told["input_size"][1:]]
        entry |= {} if channels == 3 else {"input_size": tuple(size)}
        if _builds(TimmTeacher(weights=None, **entry), model, card):
            return {"source": "timm", "weights": None, **entry}
    for name in _torchvision_names(model):
        entry = {"model": name} | ({} if classes == 1000 else {"num_classes": classes})
        if _builds(TorchvisionTeacher(weights=None, **entry), model, card):
            return {"source": "torchvision", "weights": None, **entry}
    kind = type(model)
    return {"source": MEMORY, "class": f"{kind.__module__}.{kind.__qualname__}"}


@torch.no_grad()
def _builds(source: TeacherSource, model: nn.Module, card: Card) -> bool:
    """Whether a source's architecture has a network's weights, and does the same with them."""
    own = tensors_of(model)
    try:
        with torch.device("meta"):  # most of those that do not fit cost nothing so
            if _shapes(tensors_of(source.build())) != _shapes(own):
                return False
        with seeded(0):
            built = source.build().to(device_of(model))
        load_state(built, own)
        to_eval(built)
        noise = blank_noise(model, card.input_size)
        found = logits_in(built(noise), card.num_classes)
        return found is not None and torch.allclose(found[1], model(noise), rtol=1e-3, atol=1e-4)
    except Exception:  # options that this architecture does not take
        return False


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
