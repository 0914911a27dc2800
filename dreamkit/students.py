"""Loading a saved student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.errors import ArtifactError, DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.pruning.surgery import Surgery
from dreamkit.recipe import build_entry
from dreamkit.store.artifact import read_artifact
from dreamkit.teachers.weights import load_into


def load_student(
    path: str | Path,
    builder: Callable[[], nn.Module] | None = None,
    allow_builder: bool = False,
) -> nn.Module:
    """Load a student that a run saved; its outputs are those it had when it was saved.

    Neither pickle nor the pruning library is involved.

    Args:
        path: the ``student`` folder of a run.
        builder: returns the unpruned architecture, in place of the one the artifact names.
        allow_builder: let the artifact import and run a builder function of its own naming
            (teachers of source ``checkpoint``). Only for artifacts that you trust.

    Returns:
        The model in eval mode, on the CPU. It takes normalised images (N, C, H, W); its ``card``
        (a ``dreamkit.card.Card``) has size, mean, std and class names, and normalises them.

    Raises:
        ArtifactError: the files are missing or damaged, or need ``allow_builder``.

    Example:
        >>> import dreamkit
        >>> student = dreamkit.load_student("runs/quickstart/student")  # doctest: +SKIP
        >>> logits = student(student.card.normalise(images))  # images: uint8  # doctest: +SKIP
    """
    folder = Path(path)
    artifact = read_artifact(folder)
    if builder is not None:
        model = builder()
    else:
        model = _build(folder, artifact.builder, allow_builder)
    Surgery.from_json(artifact.surgery).rebuild(model)
    load_into(model, artifact.state, str(folder))
    model.card = artifact.card  # type: ignore[assignment]
    return model.eval()


def _build(folder: Path, reference: dict[str, Any], allow_builder: bool) -> nn.Module:
    if reference.get("source") == "checkpoint" and not allow_builder:
        raise ArtifactError(
            f"{folder} is built by the function {reference.get('builder')}, which is code of the "
            "artifact's choosing; if you trust it, pass allow_builder=True, or pass "
            "builder=your_function"
        )
    try:
        entry = build_entry(build_registries(), "teachers", reference)
        model: nn.Module = entry.build()
    except DreamkitError as error:
        raise ArtifactError(f"{folder}: its builder cannot be used: {error}") from error
    return model
