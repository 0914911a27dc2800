"""Memory that is freed and wanted again: kept by the process for as long as a block lasts.

glibc asks the system for every large tensor and gives it back when it is freed. The system clears
pages as they are touched again, one by one: that is up to half of the time of a step at 224².
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of ``mallopt``, from glibc's ``malloc.h``."""
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
"""Everything from the heap, whose end is never given back.

Not a higher threshold for blocks of their own: older versions allow 32 MiB at most.
"""
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
"""What a process has that has run for a while.

glibc's thresholds rise to these as large blocks are freed, until one of them is set for the first
time; then they stay as they are, and those of a new process would be slow ever after.
"""
_USERS = ("mmap_max", "mmap_threshold", "top_pad", "trim_threshold")


class _Blocks:
    """How many blocks are open in this process: the allocator is the process's, too."""

    def __init__(self) -> None:
        self.open = 0
        self.lock = threading.Lock()


_blocks = _Blocks()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process for as long as the block lasts, where glibc is there.

    What is kept is what was in use at once at the peak of the block, and a tenth or so that lies
    scattered between. On leaving any block what is free then is given back, and on leaving the
    outermost, glibc is left as it is in a process that has run for a while. Blocks may be nested,
    and be open in several threads. Nothing happens with another C library, or where the user has
    set glibc's thresholds by an environment variable (``GLIBC_TUNABLES``,
    ``MALLOC_MMAP_THRESHOLD_``).
    """
    libc = _glibc()
    if libc is None or _set_by_user(os.environ):
        yield
        return
    with _blocks.lock:
        _blocks.open += 1
        if _blocks.open == 1:
            _set(libc, _KEEPING)
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.open -= 1
            if _blocks.open == 0:
                _set(libc, _USUAL)
        give_back()


def give_back() -> None:
    """Give the system what is free in this process, where glibc is there."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library that this process runs on, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows, or a Python without dynamic loading
        return None
    # Some others say that they are glibc, for the programs that ask, and lack the rest.
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return libc if all(hasattr(libc, name) for name in names) else None


def _set_by_user(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return any(
        f"glibc.malloc.{name}=" in tunables or f"MALLOC_{name.upper()}_" in environment
        for name in _USERS
    )


def _set(libc: ctypes.CDLL, values: Mapping[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
