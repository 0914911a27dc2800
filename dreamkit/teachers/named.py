"""Looking a teacher up by name: ``SOURCE:MODEL``, e.g. ``timm:resnet50``."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.registry import Registries, UnknownEntry
from dreamkit.types import Teacher

Weights = Literal["default", "null"]
"""``null`` for random ones."""
_SEED = 0


def listing_source(registries: Registries, name: str) -> type[Any]:
    """Return a source of teachers that can list its models and needs only a model's name."""
    teachers = registries["teachers"]
    try:
        cls = teachers.resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    if not hasattr(cls, "known_models"):
        raise DreamkitError(f"the source '{name}' has no list of models; use timm or torchvision")
    return cls


def load_teacher(registries: Registries, source: str, model: str, weights: Weights) -> Teacher:
    """Return a teacher on the CPU; one that ships with its weights has them in any case.

    Raises:
        DreamkitError: there is no such source or model, or its weights do not come.
    """
    cls = listing_source(registries, source)
    options: dict[str, Any] = {"model": model}
    if "weights" in inspect.signature(cls).parameters:
        options["weights"] = "default" if weights == "default" else None
    try:
        entry = cls(**options)
    except OptionError as error:
        raise DreamkitError(f"{source}:{model}: {error}") from error
    teacher: Teacher = entry.load(_SEED)
    return teacher


def load_named(registries: Registries, option: str, named: str, weights: Weights) -> Teacher:
    """Return the teacher that ``SOURCE:MODEL`` names.

    Raises:
        DreamkitError: as ``load_teacher`` does, or it is written otherwise; ``option`` says where.
    """
    source, _, model = named.partition(":")
    if not model:
        raise DreamkitError(f"{option} {named}: write SOURCE:MODEL, e.g. torchvision:mobilenet_v2")
    return load_teacher(registries, source, model, weights)
