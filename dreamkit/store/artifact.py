"""The student artifact: a model that reloads without pickle.

``artifact.json`` holds the builder (a recipe's teacher entry without weights), the channels kept
of every parameter, and the card; ``model.safetensors`` the state dict, which ``load_state_dict``
of a model built and cut that way takes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.errors import ArtifactError
from dreamkit.model_state import tensors_of
from dreamkit.store.atomic import write_atomically, write_json

FORMAT = 3
SPECIFICATION = "artifact.json"
WEIGHTS = "model.safetensors"
MAX_BYTES = 100_000_000
"""Of the specification: positions kept of every axis, of the largest networks."""


@dataclass(frozen=True)
class Artifact:
    """A student as it lies on disk.

    Args:
        builder: a teacher entry, e.g. ``{"source": "torchvision", "model": "resnet50"}``.
        card: of the student.
        pruning_record: what pruning removed, as ``PruningRecord`` writes it; empty if nothing.
        state: the weights.
    """

    builder: dict[str, Any]
    card: Card
    pruning_record: dict[str, Any]
    state: dict[str, Tensor]


def write_artifact(
    folder: Path,
    model: nn.Module,
    card: Card,
    builder: dict[str, Any],
    pruning_record: dict[str, Any],
) -> None:
    """Save a student; the specification is written last and vouches for the weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be made: {error.strerror}") from error
    # Cloned: tied weights share storage, which safetensors refuses.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors_of(model).items()}
    blob = safetensors.torch.save(state)
    write_atomically(folder / WEIGHTS, blob)
    specification = {
        "format": FORMAT,
        "builder": builder,
        "card": card.to_json(),
        "weights_sha256": hashlib.sha256(blob).hexdigest(),
        "pruning_record": pruning_record,
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
            specification["pruning_record"],
            safetensors.torch.load(blob),
        )
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} holds no student (no {Path(error.filename).name})"
        ) from error
    except ArtifactError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ArtifactError(f"{folder} cannot be read as a student: {error}") from error
