"""The dreams that a run keeps: where they lie, what was left out, what is reported of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.stages.colours import report_colours
from dreamkit.stages.statistics_distance import overall
from dreamkit.store.dreams import DreamStore
from dreamkit.types import RunContext, Synthesis, Teacher

FOUND_SECONDS = 60.0
"""How long a file that another rank wrote may take to be seen on a network drive."""


def report_synthesis(context: RunContext, store: DreamStore, teacher: Teacher) -> None:
    """Add the metrics of a run's dreams, each layer's distance, and say what is doubtful."""
    metrics = context.log.metrics
    metrics["synthesis.images"] = len(store)
    metrics["synthesis.skipped_batches"] = len(store.skipped)
    metrics["synthesis.seconds"] = store.seconds
    rate = len(store) / store.seconds * distributed.size()
    metrics["synthesis.images_per_second"] = rate
    if (mean := overall(store.statistics_distance)) is not None:
        metrics["synthesis.statistics_distance"] = mean
        context.log.details["statistics_distance"] = store.statistics_distance
    content = store.open()
    right = content.teacher_logits.argmax(1) == content.labels
    metrics["synthesis.teacher_accuracy"] = float(right.float().mean())
    report_colours(content, teacher, context.log)


def open_store(teacher: Teacher, synthesis: Synthesis, context: RunContext) -> DreamStore:
    """Return the run's store, and tell what it left out."""
    with context.log.progress("opening the dreams", 1), distributed.first_before_others():
        store = run_store(teacher, synthesis, context)
        if distributed.is_first():
            store.mend()
    distributed.barrier()  # before the first rank adds what the rest might find there
    for note in store.notes:
        context.log.note(note)
    for batch in store.skipped.values():
        note = f"batch {batch.index} was left out ({batch.reason})"
        if store.state is None:  # else later ones build on its absence
            note += f"; to try it again, remove {store.folder / batch.file}"
        context.log.note(note)
    return store


def run_store(teacher: Teacher, synthesis: Synthesis, context: RunContext) -> DreamStore:
    """Return the run's store as it lies on disk; one of other settings is refused."""
    return DreamStore(
        context.folder / RunContext.DREAMS,
        {
            "seed": context.seed,
            "teacher_sha256": teacher.card.weights_sha256,
            "synthesis": dict(synthesis.settings),
        },
    )


def find_batches(store: DreamStore, indices: Sequence[int]) -> None:
    """Take in the batches of a plan that all ranks are done with.

    Raises:
        DreamkitError: one is nowhere.
    """
    end, lacking = time.monotonic() + FOUND_SECONDS, list(indices)
    while True:
        store.refresh(lacking)
        lacking = [i for i in lacking if i not in store.shards and i not in store.skipped]
        if not lacking or time.monotonic() > end:
            break
        time.sleep(0.2)
    if distributed.anywhere(bool(lacking)):
        named = f"batch {lacking[0]}" if lacking else "another rank's batch"
        raise DreamkitError(
            f"{named} is not in {store.folder}, though every rank is done: all of them have to "
            "work in one folder that each can read, on a drive that machines share"
        )
