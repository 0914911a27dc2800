"""One process at a time: a lock on a run directory that tells who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from dreamkit.errors import RunDirectoryError

LOCK, OWNER = ".lock", ".owner.json"


class RunInUse(RunDirectoryError):
    """Another process runs in the folder."""


class RunLock:
    """A lock that ends with its process, however that ends.

    The operating system holds it (``flock``), on network file systems too where they pass it on.

    Args:
        folder: which is locked; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK)

    def acquire(self) -> str | None:
        """Take the lock.

        Returns:
            Who held it and ended without giving it back, e.g. ``process 12 on node-3``; None if
            nobody did.

        Raises:
            RunInUse: another process holds it.
            RunDirectoryError: the folder cannot be written to.
        """
        before = self._owner()
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunInUse(
                f"{self.folder} is in use by {before or 'another process'}: wait for it, or choose "
                "another folder with --out"
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"{self.folder} cannot be locked: {error.strerror}") from error
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(OSError):  # told to others, and no more than that
            (self.folder / OWNER).write_text(json.dumps(mine), encoding="utf-8")
        return before

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.folder / OWNER).unlink(missing_ok=True)
            # Its file stays: another process may have it open, and would hold one that is gone.
            self._lock.release()

    def _owner(self) -> str | None:
        try:
            told = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
            return f"process {told['pid']} on {told['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return None
