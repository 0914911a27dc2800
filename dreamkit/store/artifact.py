"""The student artifact: a model that reloads without pickle.

``artifact.json`` holds the builder (a recipe's teacher entry without weights), the channels kept
of every parameter, and the card; ``model.safetensors`` the weights. A tensor that is mostly zeros
is stored as the values that are not and a bit an element that tells where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.errors import ArtifactError
from dreamkit.store.atomic import write_atomically, write_json

FORMAT = 2
SPECIFICATION = "artifact.json"
WEIGHTS = "model.safetensors"
MAX_BYTES = 100_000_000
"""Of the specification: positions kept of every axis, of the largest networks."""
_VALUES, _PLACES = "values:", "places:"
_DENSE = 0.9
"""A tensor is stored sparse if that takes less than this share of its room."""


@dataclass(frozen=True)
class Artifact:
    """A student as it lies on disk.

    Args:
        builder: a teacher entry, e.g. ``{"source": "torchvision", "model": "resnet50"}``.
        card: of the student.
        surgery: what pruning removed, as ``dreamkit.pruning.surgery`` writes it; empty if nothing.
        state: the weights.
    """

    builder: dict[str, Any]
    card: Card
    surgery: dict[str, Any]
    state: dict[str, Tensor]


def write_artifact(
    folder: Path, model: nn.Module, card: Card, builder: dict[str, Any], surgery: dict[str, Any]
) -> None:
    """Save a student; the specification is written last and vouches for the weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be made: {error.strerror}") from error
    # Cloned: tied weights share storage, which safetensors refuses.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    packed, sparse = _pack(state)
    blob = safetensors.torch.save(packed)
    write_atomically(folder / WEIGHTS, blob)
    specification = {
        "format": FORMAT,
        "builder": builder,
        "card": card.to_json(),
        "weights_sha256": hashlib.sha256(blob).hexdigest(),
        "surgery": surgery,
        "sparse": sparse,
    }
    write_json(folder / SPECIFICATION, specification)


def read_artifact(folder: Path) -> Artifact:
    """Read a student's files, verified.

    Raises:
        ArtifactError: a file is missing, damaged or of another format.
    """
    try:
        file = folder / SPECIFICATION
        if file.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{file}: {file.stat().st_size} bytes describe no student")
        specification = json.loads(file.read_text(encoding="utf-8"))
        if specification["format"] != FORMAT:
            raise ArtifactError(
                f"{folder}: format {specification['format']}, this version reads {FORMAT}"
            )
        blob = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(blob).hexdigest() != specification["weights_sha256"]:
            raise ArtifactError(
                f"{folder / WEIGHTS} is damaged: its SHA-256 is not the recorded one"
            )
        return Artifact(
            specification["builder"],
            Card.from_json(specification["card"]),
            specification["surgery"],
            _unpack(safetensors.torch.load(blob), specification["sparse"]),
        )
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} holds no student (no {Path(error.filename).name})"
        ) from error
    except ArtifactError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ArtifactError(f"{folder} cannot be read as a student: {error}") from error


def _pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return tensors as they are stored, and the shapes of those that are stored sparse."""
    packed: dict[str, Tensor] = {}
    shapes = {}
    for name, tensor in state.items():
        flat = tensor.flatten()
        there = flat != 0
        values = flat[there]
        places = torch.from_numpy(np.packbits(there.numpy()))
        room = values.numel() * values.element_size() + places.numel()
        if tensor.is_floating_point() and room < _DENSE * flat.numel() * flat.element_size():
            packed |= {_VALUES + name: values, _PLACES + name: places}
            shapes[name] = list(tensor.shape)
        else:
            packed[name] = tensor
    return packed, shapes


def _unpack(packed: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Return tensors as they were before ``_pack``."""
    state = dict(packed)
    for name, shape in shapes.items():
        values, places = state.pop(_VALUES + name), state.pop(_PLACES + name)
        if not all(type(side) is int and side >= 0 for side in shape) or not (
            math.prod(shape) <= 8 * places.numel()
        ):
            raise ValueError(f"'{name}' is not of the shape {shape}")
        flat = torch.zeros(math.prod(shape), dtype=values.dtype)
        there = np.unpackbits(places.numpy(), count=flat.numel()).astype(bool)
        flat[torch.from_numpy(there)] = values
        state[name] = flat.view(shape)
    return state
