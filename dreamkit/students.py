"""Loading a saved student, as a model or as a teacher of recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import ArtifactError, MissingPath, TeacherMismatch
from dreamkit.model_state import seeded, to_eval
from dreamkit.plugins import build_registries
from dreamkit.pruning.pattern import checked_patterns
from dreamkit.pruning.record import PruningRecord
from dreamkit.recipe import build_entry
from dreamkit.store.artifact import SPECIFICATION, Artifact, read_artifact
from dreamkit.teachers.builders import call_builder, check_builder
from dreamkit.teachers.intake import take_logits
from dreamkit.teachers.learning import hold_in_training
from dreamkit.teachers.logits import TakeLogits
from dreamkit.teachers.provenance import tell
from dreamkit.teachers.readying import made_ready
from dreamkit.teachers.weights import hash_weights, load_into
from dreamkit.types import RunContext, Teacher, TeacherSource
from dreamkit.wording import one_line

_PARENTS = 4
"""Folders above a student in which its builder's file is looked for, when it was moved."""


class BuilderNeeded(ArtifactError):
    """A student is built by code that its reader has to allow or to give; in Python's words."""

    what = ""
    may_be_allowed = False

    def in_words(self, allow: str, builder: str) -> ArtifactError:
        """Return the error in the words of another door.

        Args:
            allow: what to do to let the student's own builder run.
            builder: what to do to give another.
        """
        return ArtifactError(_asking(self.what, self.may_be_allowed, allow, builder))


def student_folder(path: str | Path) -> Path:
    """Return the folder of a student, given that or the folder of its run."""
    folder = Path(path)
    inner = folder / RunContext.STUDENT
    return inner if (inner / SPECIFICATION).is_file() else folder


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
    """Load a student that a run saved, without pickle; its outputs are those it had then.

    Args:
        path: the ``student`` folder of a run, or the run's.
        builder: a function or class that returns the unpruned architecture, in place of the one the
            artifact names; or that architecture itself, which is copied.
        allow_builder: let the artifact import and run a builder function of its own naming
            (teachers of source ``checkpoint``). Only for artifacts that you trust.

    Returns:
        The model in eval mode, on the CPU. It takes normalised images (N, C, H, W); its ``card``
        (a ``dreamkit.card.Card``) has size, mean, std and class names, and normalises them. Its
        ``provenance`` has the builder and the record of what was pruned (of patterns, those that
        the weights have): pruned further, it is saved with the whole of it.

    Raises:
        ArtifactError: the files are missing or damaged, or need ``builder`` or ``allow_builder``.

    Example:
        >>> import dreamkit
        >>> student = dreamkit.load_student("runs/quickstart/student")  # doctest: +SKIP
        >>> logits = student(student.card.normalise(images))  # images: uint8  # doctest: +SKIP
    """
    folder = student_folder(path)
    if builder is not None and not callable(builder):
        raise ArtifactError(
            "builder: should be a function or class that returns the network before pruning, or "
            f"that network, not {builder!r}"
        )
    artifact = _read(folder)
    model = _architecture(folder, artifact, builder, allow_builder)
    load_into(model, artifact.state, str(folder))
    card = artifact.card
    try:
        for settle in (take_logits, hold_in_training):  # as it was when the student was made
            settle(model, card.input_size, card.num_classes, lambda text: None, str(folder))
    except TeacherMismatch as error:
        raise ArtifactError(error.message) from error
    # For whoever prunes it further: whatever built it here, these make it from nothing.
    tell(model, card, artifact.builder, checked_patterns(artifact.pruning_record, artifact.state))
    to_eval(model)
    return cast(Student, model)


def load_unpruned(
    path: str | Path,
    builder: Callable[[], nn.Module] | nn.Module | None = None,
    allow_builder: bool = False,
) -> nn.Module:
    """Return what a student was pruned from, with random weights, in eval mode: logits alone.

    Args:
        path: the ``student`` folder of a run.
        builder: as of ``load_student``.
        allow_builder: as of ``load_student``.

    Raises:
        ArtifactError: as ``load_student`` does.
    """
    folder = Path(path)
    artifact = _read(folder)
    model = _unpruned(folder, artifact, builder, allow_builder)
    if not isinstance(model, torch.jit.ScriptModule):  # which takes no hooks
        model.register_forward_hook(TakeLogits(artifact.card.num_classes))
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
        builder: ``package.module:function`` or ``path/to/file.py:function`` that returns the
            network before it was pruned, in place of the one that the artifact names.
    """

    path: str
    weights: Literal["saved"] | None = "saved"
    allow_builder: bool = False
    builder: str | None = None

    def __post_init__(self) -> None:
        if self.builder is not None:
            check_builder(self.builder)
        if not (Path(self.path) / SPECIFICATION).is_file():
            raise MissingPath("path", f"no such student: {self.path} (no {SPECIFICATION})")

    def build(self) -> nn.Module:
        """Return the architecture, as it was pruned, with random weights."""
        return self._built(_read(Path(self.path)))

    def _built(self, artifact: Artifact) -> nn.Module:
        given = None if self.builder is None else partial(call_builder, self.builder, {})
        try:
            return _architecture(Path(self.path), artifact, given, self.allow_builder)
        except BuilderNeeded as error:
            words = ("write allow_builder: true", "write builder: path/to/file.py:function")
            raise error.in_words(*words) from error

    def load(self, seed: int) -> Teacher:
        """Return the student in eval mode with its card."""
        artifact = _read(Path(self.path))
        with seeded(seed):
            model = self._built(artifact)
        if self.weights is not None:
            load_into(model, artifact.state, self.path)
        card = dataclasses.replace(
            artifact.card,
            trained=artifact.card.trained and self.weights is not None,
            weights_sha256=hash_weights(model),
        )
        to_eval(model)
        record = checked_patterns(artifact.pruning_record, model.state_dict())
        return Teacher(model, card, artifact.builder, record)


def _architecture(
    folder: Path,
    artifact: Artifact,
    builder: Callable[[], nn.Module] | nn.Module | None,
    allow_builder: bool,
) -> nn.Module:
    """Return what an artifact's weights fit into."""
    model = _unpruned(folder, artifact, builder, allow_builder)
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


def _unpruned(
    folder: Path,
    artifact: Artifact,
    builder: Callable[[], nn.Module] | nn.Module | None,
    allow_builder: bool,
) -> nn.Module:
    """Return the network that a student was pruned from: the caller's own, or the artifact's."""
    if builder is None:
        model = _build(folder, artifact.builder, allow_builder)
    else:  # a network is callable too
        model = builder if isinstance(builder, nn.Module) else builder()
    return made_ready(model, artifact.card.input_size, role=str(folder))


def _build(folder: Path, reference: dict[str, Any], allow_builder: bool) -> nn.Module:
    if not isinstance(reference, dict) or reference.get("source") == "student":
        raise ArtifactError(f"{folder}: its builder is no teacher, but {reference!r}")
    if reference.get("source") == "memory":
        what = f"{folder} was a network in memory (class {reference.get('class')})"
        raise _builder_needed(what, may_be_allowed=False)
    if reference.get("source") == "checkpoint":
        named = reference.get("builder")
        if not allow_builder:
            what = f"{folder} is built by the function {named}, code of the artifact's choosing"
            raise _builder_needed(what, may_be_allowed=True)
        file = _file_of(reference)
        if file is not None and not _is_there(file):
            what = (
                f"{folder} is built by the function {named}, and there is no such file "
                f"(relative paths start at {Path.cwd()}), nor a {file.name} beside the student or "
                "in the folders above it: put it there"
            )
            raise _builder_needed(what, may_be_allowed=False)
    try:
        entry = build_entry(build_registries(), "teachers", reference)
        model: nn.Module = entry.build()
    except Exception as error:  # a file may ask for a network of any shape
        reason = one_line(error, 1000)
        raise ArtifactError(f"{folder}: its builder cannot be used: {reason}") from error
    return model


def _builder_needed(what: str, may_be_allowed: bool) -> BuilderNeeded:
    given = "pass builder=..., a function or class that returns it unpruned"
    error = BuilderNeeded(_asking(what, may_be_allowed, "pass allow_builder=True", given))
    error.what, error.may_be_allowed = what, may_be_allowed
    return error


def _asking(what: str, may_be_allowed: bool, allow: str, builder: str) -> str:
    trusted = f"if you trust it, {allow}, or " if may_be_allowed else ""
    return f"{what}: {trusted}{builder}"


def _read(folder: Path) -> Artifact:
    """Return an artifact, whose builder's file may have been moved with it."""
    artifact = read_artifact(folder)
    file = _file_of(artifact.builder)
    if file is None or _is_there(file):
        return artifact
    here = folder.resolve()
    for parent in (here, *here.parents[:_PARENTS]):
        for number in range(min(_PARENTS, len(file.parts)), 0, -1):
            moved = parent.joinpath(*file.parts[-number:])
            if _is_there(moved):
                name = str(artifact.builder["builder"]).rpartition(":")[2]
                builder = artifact.builder | {"builder": f"{moved}:{name}"}
                return dataclasses.replace(artifact, builder=builder)
    return artifact


def _file_of(reference: Any) -> Path | None:
    """Return the file of a builder that an artifact names, if it names one."""
    named = reference.get("builder") if isinstance(reference, dict) else None
    place = named.rpartition(":")[0] if isinstance(named, str) else ""
    return Path(place) if place.endswith(".py") else None


def _is_there(file: Path) -> bool:
    try:
        return file.expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # what is no path, or nobody's home
        return False
