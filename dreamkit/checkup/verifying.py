"""Holding what a run left against what vouches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dreamkit.errors import ArtifactError, DreamkitError, RunDirectoryError
from dreamkit.pruning.pattern import checked_patterns
from dreamkit.pruning.record import PruningRecord
from dreamkit.stages.quantized_file import check_quantized
from dreamkit.store.artifact import SPECIFICATION, read_artifact
from dreamkit.store.checkpoint import read_checkpoint
from dreamkit.store.dreams import DreamStore
from dreamkit.store.run_directory import RECIPE, REPORT, read_report
from dreamkit.types import RunContext
from dreamkit.wording import and_more, say


@dataclass(frozen=True)
class Finding:
    """One thing that a run keeps.

    Args:
        path: below the run directory.
        content: what it is.
        problem: what is wrong with it; None if it is intact.
    """

    path: str
    content: str
    problem: str | None


def verify_run(folder: Path) -> list[Finding]:
    """Read every dream, student, checkpoint and report of a run; nothing is changed.

    Raises:
        RunDirectoryError: the folder is no run.
    """
    if not (folder / RECIPE).is_file():
        raise RunDirectoryError(f"{folder} holds no run (no {RECIPE})")
    found: list[Finding] = []
    for dreams in sorted(folder.glob(f"**/{RunContext.DREAMS}")):
        found += _dreams(folder, dreams)
    for specification in sorted(folder.glob(f"**/{SPECIFICATION}")):
        student = specification.parent
        problem = _problem(partial(_check_student, student))
        found.append(Finding(str(student.relative_to(folder)), "a student", problem))
    for described in sorted(folder.glob(f"**/{RunContext.QUANTIZED}/*.json")):
        problem = _problem(partial(check_quantized, described))
        found.append(Finding(str(described.relative_to(folder)), "a file in integers", problem))
    for checkpoint in sorted(folder.glob(f"**/{RunContext.CHECKPOINTS}/*.safetensors")):
        problem = _problem(partial(read_checkpoint, checkpoint))
        found.append(Finding(str(checkpoint.relative_to(folder)), "a checkpoint", problem))
    if (folder / REPORT).is_file():
        found.append(Finding(REPORT, "the report", _problem(partial(read_report, folder))))
    return found


def _check_student(folder: Path) -> None:
    """Read a student.

    Raises:
        ArtifactError: it is damaged, or its weights do not have the zeros that its record tells of.
    """
    artifact = read_artifact(folder)
    said = PruningRecord.from_json(artifact.pruning_record).to_json()
    held = checked_patterns(said, artifact.state)["patterns"]
    lost = [name for name in said["patterns"] if name not in held]
    if lost:
        raise ArtifactError(f"{folder}: weights without the pattern on record: {and_more(lost)}")


def _dreams(folder: Path, store_folder: Path) -> Iterator[Finding]:
    place = store_folder.relative_to(folder)
    try:
        store = DreamStore(store_folder)
    except DreamkitError as error:
        yield Finding(str(place), "dreams", error.message)
        return
    damaged = store.damaged()
    for name in damaged:
        yield Finding(str(place / name), "a batch of dreams", "it is not what its header tells")
    intact = sum(shard.file not in damaged for shard in store.shards.values())
    yield Finding(str(place), f"{intact} batch{'' if intact == 1 else 'es'} of dreams", None)


def _problem(read: Callable[[], object]) -> str | None:
    try:
        read()
    except DreamkitError as error:
        return error.message
    return None


def show_findings(found: list[Finding], console: Console) -> bool:
    """Print what was found; return whether all of it is intact."""
    table = Table("what", "where", "state")
    for finding in found:
        table.add_row(finding.content, finding.path, finding.problem or "intact")
    console.print(table)
    damaged = [finding for finding in found if finding.problem is not None]
    if damaged:
        say(
            console,
            f"{len(damaged)} damaged. The run's own command dreams damaged batches again; of a "
            "damaged checkpoint or student, delete it first",
        )
    return not damaged
