"""Writing a recipe to start from, fitted to the teacher's images."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.recipe.yaml_nodes import parse_yaml
from dreamkit.registry import Registries
from dreamkit.synthesizers.planning import default_batch
from dreamkit.synthesizers.stage import Stage, default_stages
from dreamkit.teachers.named import load_teacher, split_name, teacher_options
from dreamkit.types import Teacher

_HEAD = "start"
_COMMENTS = 25
"""Column of the comments behind a value."""
_SMALL = 64
"""Side of the images up to which a batch of 256 is no burden."""


def starters() -> list[str]:
    """Return the applications that there is a template for."""
    files = (resources.files("dreamkit.starters")).iterdir()
    names = (file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    return sorted(name for name in names if name != _HEAD)


def write_starter(registries: Registries, file: Path, application: str, teacher: str) -> None:
    """Write a commented recipe.

    Args:
        registries: where the teacher's source stands.
        file: must not exist.
        application: what is done with the dreams, one of ``starters()``.
        teacher: ``SOURCE:MODEL``.

    Raises:
        DreamkitError: the file exists or cannot be written, there is no template for the
            application, or no such teacher.
    """
    if file.exists():
        raise DreamkitError(f"{file} exists already: choose another name, or remove it")
    if application not in starters():
        raise DreamkitError(
            f"--from {application}: no recipe to start from{did_you_mean(application, starters())} "
            f"(choices: {', '.join(starters())})"
        )
    source, model = split_name("--teacher", teacher)
    # Random weights tell the size of the images as well, and are not downloaded.
    network = load_teacher(registries, source, model, "null")
    try:
        options = teacher_options(registries, source, model, "default")
    except DreamkitError:  # none are published
        options = teacher_options(registries, source, model, "null")
    text = starter(application, {"source": source, **options}, network, file)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise DreamkitError(f"{file} cannot be written: {error.strerror}") from error


def starter(application: str, teacher: dict[str, Any], network: Teacher, file: Path) -> str:
    """Return a recipe's text.

    Args:
        application: one of ``starters()``.
        teacher: its entry in the recipe.
        network: what the entry gives, whatever its weights.
        file: where the text will stand.
    """
    card = network.card
    channels, *size = card.input_size
    small, photographs = max(size) <= _SMALL, channels == 3
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", file.stem).lstrip("_.-")[:100] or application
    other: dict[str, Any] = {"source": "cifar", "model": "resnet20", "weights": None}
    other |= {"input_size": card.input_size, "mean": card.mean, "std": card.std}
    other["num_classes"] = card.num_classes
    verifier: dict[str, Any] = {"source": "torchvision", "model": "mobilenet_v2"}
    if small or card.num_classes != 1000:
        verifier = other | {"weights": "data/verifier.safetensors"}
    facts = f"{card.num_classes} classes, {channels}x{size[0]}x{size[1]}"
    if teacher.get("weights", "default") is None:
        facts += ". Its weights are random: give a path to .safetensors or .pth"
    filled = {
        "name": name,
        "file": file,
        "facts": facts,
        "teacher": _flow(teacher),
        "student": _flow(teacher | {"weights": None} if "weights" in teacher else other),
        "verifier": _flow(verifier),
        "images": 1024,
        "batch_size": 256 if small else default_batch(network),
        "stages": "\n".join(f"    - {_stage(stage)}" for stage in default_stages(network)),
        "flip": str(photographs).lower(),
        "jitter": "null" if max(size) > 16 else 0,
    }
    folder = resources.files("dreamkit.starters")
    parts = [(folder / f"{part}.yaml").read_text("utf-8") for part in (_HEAD, application)]
    text = Template("".join(parts)).substitute(filled)
    return re.sub(r"(?m)(.*\S)  # ", lambda found: f"{found[1]:<{_COMMENTS}}  # ", text)


def _stage(stage: Stage) -> str:
    """Write a stage in braces, its size as one number where it is a square."""
    if not isinstance(stage.size, tuple):
        return _flow({"steps": stage.steps})
    sides = sorted({*stage.size})
    return _flow({"size": sides[0] if len(sides) == 1 else list(stage.size), "steps": stage.steps})


def _flow(entry: dict[str, Any]) -> str:
    """Return an entry in one line of YAML, words unquoted where they read the same without."""

    def written(value: Any) -> str:
        plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
        same = plain and parse_yaml(str(value), "").plain() == value
        return str(value) if same else json.dumps(value)

    return "{" + ", ".join(f"{key}: {written(value)}" for key, value in entry.items()) + "}"
