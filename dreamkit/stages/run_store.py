"""The dreams that a run keeps: where they lie, what was left out, what is reported of them."""

from __future__ import annotations

from dreamkit import distributed
from dreamkit.store.dreams import DreamStore
from dreamkit.types import RunContext, Synthesis, Teacher


def report_synthesis(context: RunContext, store: DreamStore) -> None:
    """Add the metrics of a run's dreams."""
    metrics = context.log.metrics
    metrics["synthesis.images"] = len(store)
    metrics["synthesis.skipped_batches"] = len(store.skipped)
    metrics["synthesis.seconds"] = store.seconds
    rate = len(store) / store.seconds * distributed.size()
    metrics["synthesis.images_per_second"] = rate
    if store.r_feature is not None:
        metrics["synthesis.r_feature"] = store.r_feature
    content = store.open()
    right = content.teacher_logits.argmax(1) == content.labels
    metrics["synthesis.teacher_accuracy"] = float(right.float().mean())


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
