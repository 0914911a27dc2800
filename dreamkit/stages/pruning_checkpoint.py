"""What a run has pruned so far, kept after every round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamkit.errors import StoreError
from dreamkit.stages.reconstructing import reconstruction_facts, restore_facts
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.types import Images, RunContext, Teacher


class PruningCheckpoint:
    """The checkpoint of a run's pruning; what an interrupted try left is read at once.

    Args:
        teacher: that is pruned.
        context: the run's.

    Raises:
        StoreError: the file is damaged.
    """

    def __init__(self, teacher: Teacher, context: RunContext) -> None:
        self.teacher = teacher
        self.context = context
        self.path = context.folder / RunContext.CHECKPOINTS / "pruning.safetensors"
        self.found = read_checkpoint(self.path)
        """The tensors and facts of the last finished round, None before the first."""

    def go_on(self, images: Images) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and facts that the last finished round saved, None before the first.

        Args:
            images: what is pruned on.

        Raises:
            StoreError: they are of a pruning on other images, or of another teacher.
        """
        if self.found is None:
            self.context.log.begin("pruning")
            return None
        facts = self.found[1]
        if facts["of"] != self._of(images):
            raise StoreError(
                f"{self.path} is of a pruning with {facts['of']}, and this one has "
                f"{self._of(images)}; delete it to prune from the start"
            )
        restore_facts(self.context.log, facts["reconstruction"])
        self.context.log.note(f"pruning: going on after round {facts['rounds']}")
        return self.found

    def save(
        self, images: Images, rounds: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Keep what a round came to.

        Args:
            images: what is pruned on.
            rounds: how many are done.
            tensors: the student's, and what else the next round needs.
            facts: the same of plain data.
        """
        own = {
            "of": self._of(images),
            "rounds": rounds,
            "reconstruction": reconstruction_facts(self.context.log),
        }
        write_checkpoint(self.path, tensors, own | dict(facts))

    def _of(self, images: Images) -> dict[str, Any]:
        """What a checkpoint must have in common with the run beside the recipe."""
        return {"images": len(images), "teacher": self.teacher.card.weights_sha256}
