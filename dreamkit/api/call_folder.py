"""The folder that a call keeps its work in: one call's, and by one process at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamkit.errors import DreamkitError
from dreamkit.store.atomic import write_json
from dreamkit.store.lock import LOCK, OWNER, RunLock
from dreamkit.types import Images, RunContext, Synthesis

CALL = "call.json"
"""What the folder's work was asked with."""
NETWORK = "network"
"""Under this key it has the network's card."""
_LOOKED_AT = 64
"""Images at either end of a set that tell it from others, beside their number."""


def fingerprint(images: Images | Synthesis | None) -> str | None:
    """Return what tells one set of images from another; None for dreams, whose settings do."""
    if images is None or isinstance(images, Synthesis):
        return None
    count = len(images)
    ends = sorted({*range(min(_LOOKED_AT, count)), *range(max(0, count - _LOOKED_AT), count)})
    pixels, labels = images.batch(ends)
    digest = hashlib.sha256(f"{count} {tuple(pixels.shape)}".encode())
    digest.update(pixels.contiguous().numpy().tobytes())
    digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def claimed(folder: Path, call: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder for one call, which goes on there with what it left.

    Args:
        folder: new, empty, or of the same call.
        call: what the work depends on, as plain data.

    Raises:
        DreamkitError: the folder holds something else, or another process works in it.
    """
    wanted = json.loads(json.dumps(call))
    known = _known(folder)
    if known is not None and known != wanted:
        differing = sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k))
        raise DreamkitError(
            f"out: {folder} holds the work of another call (its {', '.join(differing)} differ): "
            "choose another folder, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"out: {folder} cannot be made: {error.strerror}") from error
    lock = RunLock(folder)
    lock.acquire()
    try:
        write_json(folder / CALL, wanted)
        yield
        shutil.rmtree(folder / RunContext.CHECKPOINTS, ignore_errors=True)
    finally:
        lock.release()


def _known(folder: Path) -> dict[str, Any] | None:
    """Return the call whose work a folder holds, None if it is empty or not there."""
    try:
        known: dict[str, Any] = json.loads((folder / CALL).read_text(encoding="utf-8"))
        return known
    except FileNotFoundError:
        if folder.is_dir() and any(f.name not in {LOCK, OWNER} for f in folder.iterdir()):
            raise DreamkitError(f"out: {folder} is not empty: choose a new folder") from None
        return None
    except (OSError, ValueError) as error:
        raise DreamkitError(f"out: {folder} cannot be read: {error}") from error
