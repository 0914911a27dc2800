"""The picture of the dreams so far, which is there while a run still dreams."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.errors import RunDirectoryError
from dreamkit.report.figures import as_png, grid, thumbnails
from dreamkit.seeds import stream
from dreamkit.store.atomic import write_atomically
from dreamkit.store.dreams import DreamStore, picture_of
from dreamkit.types import DreamsPictured, RunLog, StoredImages

CELLS = 80
"""Images in the picture, as in that of the report."""
SIDE = 112
"""Pixels of the longer side of an image there at the most."""
SECONDS = 5.0
"""Between two pictures at the least."""
SHARE = 0.01
"""Of the time that drawing may take at the most."""


class ProgressPicture:
    """Draws beside a store what is dreamed so far: the first batch at work, then what is finished.

    Of more images than there is room for it shows a sample, in which every batch has its part. The
    first rank alone draws. A picture that cannot be written is noted, and no more are drawn.

    Args:
        store: of the dreams.
        card: of the teacher.
        log: told of every picture.
        clock: seconds.
    """

    def __init__(
        self,
        store: DreamStore,
        card: Card,
        log: RunLog,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.store = store
        self.path = picture_of(store.folder)
        self.card = card
        self.log = log
        self.clock = clock
        self._drawing = distributed.is_first()
        self._due = clock() + SECONDS
        self._behind = False
        self._images: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        self._keys = torch.empty(0)

    def begin(self) -> None:
        """Take in what an earlier try left in the store, as much as may be seen."""
        if not self._drawing or not self.store.shards:
            return
        keys = {index: _keys(index, shard.images) for index, shard in self.store.shards.items()}
        highest = torch.cat([*keys.values()]).sort().values[:CELLS][-1]
        for index in sorted(keys):
            if keys[index].min() <= highest:  # of the others nothing is read
                self._take(index, self.store.read(index))

    def see(self, images: Tensor, labels: Tensor) -> None:
        """Draw a batch at work, if none is finished and it is time.

        Args:
            images: (N, C, H, W), normalised, of any size.
            labels: (N,).
        """
        if self._images is None and self._drawing and self.clock() >= self._due:
            with torch.no_grad():
                stored = self.card.to_stored(images[:CELLS]).cpu()
            self._draw(thumbnails(stored, SIDE), labels[:CELLS].cpu())

    def add(self, index: int, content: StoredImages) -> None:
        """Take in a finished batch, and draw if it is the first or it is time."""
        if self._drawing:
            first = self._images is None
            self._take(index, content)
            if first or self.clock() >= self._due:
                self.catch_up()

    def catch_up(self) -> None:
        """Draw what was taken in since the last picture."""
        if self._behind and self._drawing and self._images is not None:
            self._draw(self._images, self._labels)
            self._behind = False

    def _take(self, index: int, content: StoredImages) -> None:
        """Keep those of the lowest keys: of all images so far each is as likely."""
        keys = _keys(index, len(content))
        chosen = keys.argsort()[:CELLS].sort().values
        images, labels = thumbnails(content.images[chosen], SIDE), content.labels[chosen]
        if self._images is not None:
            images = torch.cat([self._images, images])
        labels = torch.cat([self._labels, labels])
        keys = torch.cat([self._keys, keys[chosen]])
        kept = keys.argsort()[:CELLS].sort().values
        self._images, self._labels, self._keys = images[kept], labels[kept], keys[kept]
        self._behind = True

    def _draw(self, images: Tensor, labels: Tensor) -> None:
        start = self.clock()
        png = as_png(grid(images, labels))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, png)
        except (OSError, RunDirectoryError) as error:
            self.log.note(f"no more pictures of the dreams so far: {error}")
            self._drawing = False
            return
        self.log.emit(DreamsPictured(path=self.path, png=png))
        end = self.clock()
        self._due = end + max(SECONDS, (end - start) / SHARE)


def _keys(index: int, images: int) -> Tensor:
    """Return a number for each image of a batch, (N,) in [0, 1): the lowest of all are shown."""
    return torch.rand(images, generator=stream(index, "picture"))
