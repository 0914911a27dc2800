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
    if cls.known_models(pretrained=False) is None:
        raise DreamkitError(
            f"the source '{name}' has no list of models, so none can be named so. For a network "
            "of your own write a recipe whose teacher is {source: checkpoint, builder: "
            "path/to/file.py:function, path: path/to/weights.pth, ...}; in Python give the network "
            "itself"
        )
    return cls


def split_name(option: str, named: str) -> tuple[str, str]:
    """Return source and model of ``SOURCE:MODEL``.

    Raises:
        DreamkitError: it is written otherwise; ``option`` says where.
    """
    source, _, model = named.partition(":")
    if not model:
        raise DreamkitError(f"{option} {named}: write SOURCE:MODEL, e.g. torchvision:mobilenet_v2")
    return source, model


def teacher_options(
    registries: Registries, source: str, model: str, weights: Weights
) -> dict[str, Any]:
    """Return the options that make a source's entry of a model: ``model`` and mostly ``weights``.

    Raises:
        DreamkitError: there is no such source or model, or no weights of it.
    """
    cls = listing_source(registries, source)
    options: dict[str, Any] = {"model": model}
    if "weights" in inspect.signature(cls).parameters:
        options["weights"] = "default" if weights == "default" else None
    try:
        cls(**options)
    except OptionError as error:
        raise DreamkitError(f"{source}:{model}: {error}") from error
    return options


def load_teacher(registries: Registries, source: str, model: str, weights: Weights) -> Teacher:
    """Return a teacher on the CPU; one that ships with its weights has them in any case.

    Raises:
        DreamkitError: there is no such source or model, or its weights do not come.
    """
    options = teacher_options(registries, source, model, weights)
    teacher: Teacher = listing_source(registries, source)(**options).load(_SEED)
    return teacher


def load_named(registries: Registries, option: str, named: str, weights: Weights) -> Teacher:
    """Return the teacher that ``SOURCE:MODEL`` names.

    Raises:
        DreamkitError: as ``load_teacher`` does, or it is written otherwise; ``option`` says where.
    """
    return load_teacher(registries, *split_name(option, named), weights)
