"""Reading the batches of a training, each while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from torch import Tensor

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.training.batches import Draws
from dreamkit.types import Images
from dreamkit.wording import one_line

Batch = tuple[Tensor, Tensor]
"""Stored images (N, C, H, W) uint8 and their labels (N,) int64."""


class BatchReader:
    """Deals out and reads this rank's part of the next batch of every set.

    The next batch is read by a thread of its own, beside a step and never beside anything else: a
    set of images need not bear two threads at once. What that thread cannot read is read again by
    the caller's, and so is all that comes after.

    Args:
        sets: of images, from each of which a step takes a batch; they may grow between steps.
        draws: deals out the positions of each set.
        note: told if nothing can be read beside a step.
    """

    def __init__(
        self,
        sets: Sequence[Images],
        draws: Sequence[Draws],
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.sets = sets
        self.draws = draws
        self.note = note
        self.share = 1.0
        """Of the images of the first set's batch, those of this rank, times the number of ranks."""
        self._thread: ThreadPoolExecutor | None = None
        self._coming: tuple[list[list[int]], Future[list[Batch]]] | None = None
        self._before: list[dict[str, Tensor]] = []
        """Where dealing stood before what is read ahead."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Read ahead for as long as the block lasts."""
        with ThreadPoolExecutor(1, "dreamkit-reading") as self._thread:
            try:
                yield
            finally:
                self._thread = None

    def next(self) -> list[Batch]:
        """Return the next batch of every set."""
        if self._coming is None:
            return self._read(self._dealt())
        (positions, coming), self._coming = self._coming, None
        error = coming.exception()
        if error is None:
            return coming.result()
        batches = self._read(positions)  # raises here what is wrong with the images themselves
        self._thread = None
        self.note(f"images are read between steps: beside one it failed ({one_line(error)})")
        return batches

    @contextmanager
    def reading_ahead(self, wanted: bool) -> Iterator[None]:
        """Read the batch after this one while the block runs.

        Args:
            wanted: whether there is one, of the sets as they now are.
        """
        if not wanted or self._thread is None:
            yield
            return
        self._before = [draws.state() for draws in self.draws]
        positions = self._dealt()
        coming = self._thread.submit(self._read, positions)
        self._coming = (positions, coming)
        try:
            yield
        finally:
            wait([coming])

    def state(self) -> list[dict[str, Tensor]]:
        """Return where dealing stands: what ``next`` has not returned yet is still to be dealt."""
        if self._coming is not None:
            return self._before
        return [draws.state() for draws in self.draws]

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Go on from where another stood."""
        for draws, state in zip(self.draws, states, strict=True):
            draws.restore(state)

    def _dealt(self) -> list[list[int]]:
        """Return the positions of this rank's part of the next batch of every set."""
        rank, ranks = distributed.rank(), distributed.size()
        found = []
        for number, draws in enumerate(self.draws):
            dealt = draws.next()
            if len(dealt) < 2 * ranks and ranks > 1:
                raise DreamkitError(
                    f"{len(dealt)} images in a batch leave {ranks} ranks less than two each: give "
                    "it more, or use fewer ranks",
                    ("batch_size",),
                )
            found.append(dealt[rank::ranks])
            if number == 0:
                self.share = len(found[0]) * ranks / len(dealt)
        return found

    def _read(self, positions: Sequence[Sequence[int]]) -> list[Batch]:
        return [images.batch(mine) for images, mine in zip(self.sets, positions, strict=True)]
