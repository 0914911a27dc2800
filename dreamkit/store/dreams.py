"""The dream store: a folder of files, one for each batch, that tell themselves what they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamkit.errors import StoreError
from dreamkit.store.shard import (
    Header,
    Kind,
    ShardedImages,
    file_name,
    read_header,
    read_tensors,
    write_file,
)
from dreamkit.types import StoredImages

_AGAIN = "delete the file, and the same command dreams that batch again"
_ALL_AGAIN = "remove the folder: later batches build on it"


def holds_dreams(folder: Path) -> bool:
    """Whether a folder is a store with at least one batch."""
    return any(folder.glob(file_name("shard", None)))


def picture_of(folder: Path) -> Path:
    """Return where the picture of a store's dreams lies: beside its folder."""
    return folder.with_suffix(".png")


class DreamStore:
    """A folder of safetensors files. What lies in it is what there is; any rank may add to it.

    A shard holds ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64 and ``teacher_logits``
    (N, K) float16. A batch that came to nothing has a file without tensors, and what a synthesizer
    carries from batch to batch has one that names the batch that follows. Each is written whole or
    not at all; opening a store reads their headers, and the tensors are verified when first read.

    Args:
        folder: where it lies; made when the first batch is written.
        settings: what the dreams depend on; a store of other settings is refused. None to
            read whatever is there.

    Raises:
        StoreError: the folder's dreams were made with other settings, or by several runs, or by
            another version of dreamkit; or there are none, and no settings to make some with.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings or {}))
        self.choices: dict[str, Any] = {}
        """What was left to the machine and the dreams depend on; every batch has it."""
        self.shards: dict[int, Header] = {}
        self.skipped: dict[int, Header] = {}
        """Batches that came to nothing, and are not tried again while their files are there."""
        self.state: Header | None = None
        """Of what the synthesizer carries on, if it does."""
        self.notes: list[str] = []
        """What was mended, for the user to know."""
        self._unreadable: list[str] = []
        self._verified: set[str] = set()
        self._read_folder(settings is None)
        if settings is None and not self.shards and not self._unreadable:
            raise StoreError(f"{folder} holds no dreams")

    def _read_folder(self, whatever: bool) -> None:
        self.state = next(reversed(self._found("state")), None)
        batches = [*self._found("shard"), *self._found("skipped")]
        if batches:
            self.choices = batches[0].choices
            self.settings = batches[0].settings if whatever else self.settings
        following = 0 if self.state is None else self.state.index
        for header in batches:
            self._check(header, whatever)
            # A batch counts once what its synthesizer carried on from it is written too.
            if whatever or not header.carried or header.index < following:
                self._take(header)

    def _found(self, kind: str) -> list[Header]:
        """Return the headers of all files of a kind, in the order of batches."""
        found = []
        for path in sorted(self.folder.glob(file_name(kind, None))):
            header = read_header(path)
            if header is None:
                self._unreadable.append(path.name)
            else:
                found.append(header)
        return found

    def _check(self, header: Header, whatever: bool) -> None:
        found, own = header.settings, self.settings
        differing = sorted(k for k in {*found, *own} if found.get(k) != own.get(k))
        if differing and whatever:
            raise StoreError(
                f"{self.folder} holds dreams of several runs: {header.file} was made with other "
                f"settings than the first ({', '.join(differing)}); move it elsewhere"
            )
        if differing:
            raise StoreError(
                f"{self.folder} holds dreams made with other settings ({', '.join(differing)}); "
                "choose another folder"
            )

    def _take(self, header: Header) -> None:
        known = self.skipped if header.kind == "skipped" else self.shards
        known[header.index] = header

    def refresh(self, indices: Iterable[int]) -> None:
        """Take in batches that other ranks may have written since.

        They are looked for by name: what a network drive lists may be half a minute old.
        """
        for index in indices:
            for kind in ("shard", "skipped"):
                header = read_header(self.folder / file_name(kind, index))
                if header is not None and index not in self.shards:
                    self._take(header)

    # --- what is damaged ----------------------------------------------------------------------

    def damaged(self) -> list[str]:
        """Return the names of files that are not what their headers vouch for."""
        states = [] if self.state is None else [self.state]
        known = [*self.shards.values(), *self.skipped.values(), *states]
        return [*self._unreadable, *(h.file for h in known if not self._intact(h))]

    def _intact(self, header: Header) -> bool:
        try:
            self._open(header)
        except StoreError:
            return False
        return True

    def mend(self) -> None:
        """Set damaged batches aside, which are then dreamed again.

        Raises:
            StoreError: later batches build on what is damaged.
        """
        for name in self.damaged():
            path = self.folder / name
            if self.state is not None or name.startswith("state"):
                raise StoreError(f"{path} is damaged; {_ALL_AGAIN}")
            aside = path.with_name(f"{name}.damaged")
            try:
                path.replace(aside)
            except OSError as error:
                raise StoreError(f"{path} is damaged, and stays: {error.strerror}") from error
            for known in (self.shards, self.skipped):
                for index in [i for i, header in known.items() if header.file == name]:
                    del known[index]
            self.notes.append(
                f"{path} is damaged: it is set aside as {aside.name}, and its batch is dreamed "
                "again"
            )
        self._unreadable = []

    # --- reading and writing ------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    def __contains__(self, index: object) -> bool:
        return index in self.shards

    @property
    def seconds(self) -> float:
        """Time spent dreaming what is stored."""
        return sum(shard.seconds for shard in self.shards.values())

    @property
    def statistics_distance(self) -> dict[str, float]:
        """Distance of each layer's statistics, averaged over the stored images that have one."""
        total: dict[str, float] = {}
        images: dict[str, int] = {}
        for shard in self.shards.values():
            for layer, value in shard.statistics_distance.items():
                total[layer] = total.get(layer, 0.0) + value * shard.images
                images[layer] = images.get(layer, 0) + shard.images
        return {layer: value / images[layer] for layer, value in total.items()}

    def lacks(self, images: int) -> bool:
        """Whether there are fewer images than these, those of skipped batches counted."""
        return len(self) + sum(batch.images for batch in self.skipped.values()) < images

    def write(
        self,
        index: int,
        content: StoredImages,
        seconds: float,
        loss: float,
        statistics_distance: Mapping[str, float],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add one batch, whole or not at all, and what the synthesizer carries on from it."""
        assert content.teacher_logits is not None
        tensors = {
            "images": content.images,
            "labels": content.labels,
            "teacher_logits": content.teacher_logits.to(torch.float16),
        }
        told = {
            "seconds": seconds,
            "loss": loss,
            "statistics_distance": dict(statistics_distance),
            "carried": bool(state),
        }
        shard = self._write("shard", index, tensors, images=len(content), **told)
        if state:  # the batch counts from here on
            before, self.state = self.state, self._write("state", index + 1, state)
            if before is not None and before.index != index + 1:
                (self.folder / before.file).unlink(missing_ok=True)
        self._take(shard)

    def skip(self, index: int, images: int, reason: str) -> None:
        """Note that a batch came to nothing."""
        self._take(self._write("skipped", index, {}, images=images, reason=reason))

    def _write(self, kind: Kind, index: int, tensors: Mapping[str, Tensor], **told: Any) -> Header:
        header = Header(kind, index, settings=self.settings, choices=self.choices, **told)
        header = write_file(self.folder, header, tensors)
        self._verified.add(header.file)
        return header

    def withdraw(self) -> None:
        """Remove a store without dreams, so that what came to nothing is tried again."""
        if self.shards:
            return
        for batch in self.skipped.values():
            (self.folder / batch.file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is more in it, or another rank was quicker
            self.folder.rmdir()

    def read_state(self) -> dict[str, Tensor]:
        """Return what the synthesizer carries on from the last batch; empty if nothing.

        Raises:
            StoreError: it is damaged, or a batch that it follows is gone.
        """
        if self.state is None:
            return {}
        gone = {*range(self.state.index)} - {*self.shards, *self.skipped}
        if gone:
            raise StoreError(
                f"{self.folder}: batch {min(gone)} is gone, and this synthesizer's batches build "
                "on one another, so that it cannot be made again by itself; remove the folder"
            )
        return self._open(self.state)

    def open(self, first: int | None = None) -> ShardedImages:
        """Verify shards and return their images in the order of the batches.

        Args:
            first: open only as many shards as hold this many images.

        Raises:
            StoreError: there is none, or one is gone or damaged.
        """
        if self._unreadable:
            raise StoreError(f"{self.folder / self._unreadable[0]} is damaged; {_AGAIN}")
        if not self.shards:
            raise StoreError(f"{self.folder} holds no dreams")
        opened: list[dict[str, Tensor]] = []
        count = 0
        for index in sorted(self.shards):
            if first is not None and count >= first:
                break
            opened.append(self._open(self.shards[index]))
            count += self.shards[index].images
        return ShardedImages(opened)

    def read(self, index: int) -> StoredImages:
        """Return one batch, verified.

        Raises:
            StoreError: it is gone or damaged.
        """
        tensors = self._open(self.shards[index])
        return StoredImages(tensors["images"], tensors["labels"], tensors["teacher_logits"])

    def _open(self, header: Header) -> dict[str, Tensor]:
        sha256 = None if header.file in self._verified else header.sha256
        fix = _AGAIN if self.state is None else _ALL_AGAIN
        tensors = read_tensors(self.folder / header.file, sha256, fix)
        self._verified.add(header.file)
        return tensors
