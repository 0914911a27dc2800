"""Loading a saved student, as a model or as a teacher of recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from dreamkit.card import Card
from dreamkit.errors import ArtifactError, MissingPath
from dreamkit.model_state import seeded, to_eval
from dreamkit.plugins import build_registries
from dreamkit.pruning.record import PruningRecord
from dreamkit.recipe import build_entry
from dreamkit.store.artifact import SPECIFICATION, Artifact, read_artifact
from dreamkit.teachers.intake import take_logits
from dreamkit.teachers.provenance import tell
from dreamkit.teachers.readying import made_ready
from dreamkit.teachers.weights import hash_weights, load_into
from dreamkit.types import Teacher, TeacherSource
from dreamkit.wording import one_line


class Student(nn.Module):
    """What type checkers know of a loaded network: that it has a card. It is none of this class.

    Args:
        card: its size, mean, std and class names.
        provenance: its builder, and the record of what was pruned.
    """

    card: Card
    provenance: Mapping[str, Any]


def load_student(
    path: str | Path,
    builder: Callable[[], nn.Module] | nn.Module | None = None,
    allow_builder: bool = False,
) -> Student:
    """Load a student that a run saved; its outputs are those it had when it was saved.

    No pickle is involved.

    Args:
        path: the ``student`` folder of a run.
        builder: a function or class that returns the unpruned architecture, in place of the one the
            artifact names; or that architecture itself, which is copied.
        allow_builder: let the artifact import and run a builder function of its own naming
            (teachers of source ``checkpoint``). Only for artifacts that you trust.

    Returns:
        The model in eval mode, on the CPU. It takes normalised images (N, C, H, W); its ``card``
        (a ``dreamkit.card.Card``) has size, mean, std and class names, and normalises them. Its
        ``provenance`` has the builder and the record of what was pruned: pruned further, it is
        saved with the whole of it.

    Raises:
        ArtifactError: the files are missing or damaged, or need ``builder`` or ``allow_builder``.

    Example:
        >>> import dreamkit
        >>> student = dreamkit.load_student("runs/quickstart/student")  # doctest: +SKIP
        >>> logits = student(student.card.normalise(images))  # images: uint8  # doctest: +SKIP
    """
    folder = Path(path)
    if builder is not None and not callable(builder):
        raise ArtifactError(
            "builder: should be a function or class that returns the network before pruning, or "
            f"that network, not {builder!r}"
        )
    artifact = read_artifact(folder)
    model = _architecture(folder, artifact, builder, allow_builder)
    load_into(model, artifact.state, str(folder))
    card = artifact.card
    take_logits(model, card.input_size, card.num_classes, lambda text: None, str(folder))
    # For whoever prunes it further: whatever built it here, these make it from nothing.
    tell(model, artifact.card, artifact.builder, artifact.pruning_record)
    to_eval(model)
    return cast(Student, model)


def load_unpruned(path: str | Path, allow_builder: bool = False) -> nn.Module:
    """Return the network that a student was pruned from, with random weights, in eval mode.

    Args:
        path: the ``student`` folder of a run.
        allow_builder: as of ``load_student``.

    Raises:
        ArtifactError: as ``load_student`` does.
    """
    folder = Path(path)
    model = _build(folder, read_artifact(folder).builder, allow_builder)
    to_eval(model)
    return model


@dataclass(frozen=True)
class SavedStudent(TeacherSource):
    """A student that an earlier run saved: to teach, to go on teaching, or to prune further.

    Args:
        path: the ``student`` folder of a run.
        weights: ``saved``, or null for the architecture with random ones.
        allow_builder: let the artifact import and run a builder function of its own naming. Only
            for artifacts that you trust.
    """

    path: str
    weights: Literal["saved"] | None = "saved"
    allow_builder: bool = False

    def __post_init__(self) -> None:
        if not (Path(self.path) / SPECIFICATION).is_file():
            raise MissingPath("path", f"no such student: {self.path} (no {SPECIFICATION})")

    def build(self) -> nn.Module:
        """Return the architecture, as it was pruned, with random weights."""
        folder = Path(self.path)
        return _architecture(folder, read_artifact(folder), None, self.allow_builder)

    def load(self, seed: int) -> Teacher:
        """Return the student in eval mode with its card."""
        folder = Path(self.path)
        artifact = read_artifact(folder)
        with seeded(seed):
            model = _architecture(folder, artifact, None, self.allow_builder)
        if self.weights is not None:
            load_into(model, artifact.state, str(folder))
        card = dataclasses.replace(
            artifact.card,
            trained=artifact.card.trained and self.weights is not None,
            weights_sha256=hash_weights(model),
        )
        to_eval(model)
        return Teacher(model, card, artifact.builder, artifact.pruning_record)


def _architecture(
    folder: Path,
    artifact: Artifact,
    builder: Callable[[], nn.Module] | nn.Module | None,
    allow_builder: bool,
) -> nn.Module:
    """Return what an artifact's weights fit into."""
    if builder is None:
        model = _build(folder, artifact.builder, allow_builder)
    else:  # a network is callable too
        model = builder if isinstance(builder, nn.Module) else builder()
    model = made_ready(model, artifact.card.input_size, role=str(folder))
    try:
        pruning_record = PruningRecord.from_json(artifact.pruning_record)
        # Before there is room made for what a file claims.
        for name, outputs in pruning_record.grown.items():
            if name not in artifact.state or len(artifact.state[name]) != outputs:
                raise ArtifactError(f"its weights have no '{name}' with {outputs} outputs")
        pruning_record.rebuild(model)
    except Exception as error:  # a file may claim anything of any tensor
        raise ArtifactError(f"{folder}: {error}") from error
    return model


def _build(folder: Path, reference: dict[str, Any], allow_builder: bool) -> nn.Module:
    if not isinstance(reference, dict) or reference.get("source") == "student":
        raise ArtifactError(f"{folder}: its builder is no teacher, but {reference!r}")
    if reference.get("source") == "memory":
        raise ArtifactError(
            f"{folder} was a network in memory (class {reference.get('class')}): pass builder=..., "
            "a function or class that returns it unpruned"
        )
    if reference.get("source") == "checkpoint" and not allow_builder:
        raise ArtifactError(
            f"{folder} is built by the function {reference.get('builder')}, which is code of the "
            "artifact's choosing; if you trust it, pass allow_builder=True, or pass "
            "builder=your_function"
        )
    try:
        entry = build_entry(build_registries(), "teachers", reference)
        model: nn.Module = entry.build()
    except Exception as error:  # a file may ask for a network of any shape
        reason = one_line(error)
        raise ArtifactError(f"{folder}: its builder cannot be used: {reason}") from error
    return model
