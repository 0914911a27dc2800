"""One file of a dream store: tensors, and a header that tells what they are and vouches for them.

The header is read without the tensors, so that a store of thousands of files opens quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamkit.errors import StoreError
from dreamkit.flat_state import hash_state
from dreamkit.store.atomic import write_atomically

Kind = Literal["shard", "skipped", "state"]
FORMAT = 6
_HEADER = "dreamkit"
"""Key of the safetensors metadata: the format, the SHA-256 of it and the header, the header."""


@dataclass(frozen=True)
class Header:
    """What a file of the store tells of itself.

    Args:
        kind: a finished batch; one that came to nothing, which has no tensors; or what the
            synthesizer carries on from batch to batch.
        index: number of the batch; of a state, that of the batch that follows.
        settings: what the dreams depend on.
        choices: what was left to the machine and the dreams depend on.
        images: how many the batch has, or would have had.
        seconds: that it took.
        loss: at the end.
        statistics_distance: of its images, by layer, as a multiple of chance.
        carried: whether it counts only together with a later state.
        reason: why it came to nothing.
        sha256: of the tensors.
    """

    kind: Kind
    index: int
    settings: dict[str, Any]
    choices: dict[str, Any]
    images: int = 0
    seconds: float = 0.0
    loss: float | None = None
    statistics_distance: dict[str, float] = field(default_factory=dict)
    carried: bool = False
    reason: str | None = None
    sha256: str = ""

    @property
    def file(self) -> str:
        """Its name in the store's folder."""
        return file_name(self.kind, self.index)


def file_name(kind: str, index: int | None) -> str:
    """Return the name of a batch's file, or the pattern of all of a kind."""
    return f"{kind}-{'*' if index is None else f'{index:06d}'}.safetensors"


def write_file(folder: Path, header: Header, tensors: Mapping[str, Tensor]) -> Header:
    """Write a file whole or not at all; return the header with the tensors' SHA-256.

    Raises:
        StoreError: the folder cannot be made.
        RunDirectoryError: the disk is full or the folder cannot be written to.
    """
    # Cloned: tensors that share storage are refused by safetensors.
    held = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = replace(header, sha256=hash_state(held))
    text = json.dumps(asdict(header))
    metadata = {_HEADER: f"{FORMAT} {_digest(str(FORMAT), text)} {text}"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}") from error
    write_atomically(folder / header.file, safetensors.torch.save(held, metadata), by_any_rank=True)
    return header


def read_header(path: Path) -> Header | None:
    """Return what a file tells of itself; None if it is gone or damaged.

    Raises:
        StoreError: another version of dreamkit wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        version, text = _checked(metadata[_HEADER])
        if version != str(FORMAT):
            raise StoreError(
                f"{path} is of format {version}, and this version of dreamkit reads {FORMAT}: "
                "read it with the version that wrote it"
            )
        header = Header(**json.loads(text))
        # A file that was given another's name would stand for another batch.
        return header if header.file == path.name else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def read_tensors(path: Path, sha256: str | None, fix: str) -> dict[str, Tensor]:
    """Return a file's tensors, mapped from disk.

    Args:
        path: of the file.
        sha256: what to hold them against; None if that was done before.
        fix: what to do if it is damaged.

    Raises:
        StoreError: it is gone, or damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}; {fix}") from error
    if sha256 is not None and hash_state(tensors) != sha256:
        raise StoreError(f"{path} is damaged: its SHA-256 is not its header's; {fix}")
    return tensors


class ShardedImages:
    """The images of a store. They are mapped from disk, so that they need not fit in memory.

    Args:
        shards: the tensors of each shard.
    """

    def __init__(self, shards: Sequence[dict[str, Tensor]]) -> None:
        self._images = [shard["images"] for shard in shards]
        self._place = [(s, row) for s, part in enumerate(self._images) for row in range(len(part))]
        self.labels = torch.cat([shard["labels"] for shard in shards])
        """(N,) int64."""
        self.teacher_logits = torch.cat([shard["teacher_logits"] for shard in shards])
        """(N, K) float16."""

    def __len__(self) -> int:
        return len(self._place)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self._images[0].shape[1:])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) uint8 and labels (N,)."""
        rows = [self._place[index] for index in indices]
        images = torch.stack([self._images[shard][row] for shard, row in rows])
        return images, self.labels[torch.as_tensor(indices)]


def _checked(told: str) -> tuple[str, str]:
    """Return the version of a header, and the header.

    Raises:
        ValueError: it is damaged.
    """
    if told.startswith("{"):  # up to format 4 it was JSON by itself
        return str(json.loads(told)["format"]), told
    version, digest, text = told.split(" ", 2)
    if digest != _digest(version, text):
        raise ValueError("its SHA-256 is another")
    return version, text


def _digest(version: str, text: str) -> str:
    return hashlib.sha256(f"{version} {text}".encode()).hexdigest()
