"""How much memory something takes, and how much there is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dreamkit.errors import DreamkitError

MEMORY_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of the memory available, what ``batch_size: auto`` plans with; the rest is for others."""
_PROCESS = Path("/proc/self")
_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass
class Peak:
    """Most memory in use at once, in bytes: the process's on a CPU, torch's on a GPU."""

    total: int = 0
    start: int = 0

    @property
    def above_start(self) -> int:
        """How much more than when the block began."""
        return max(0, self.total - self.start)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of a block; the result is filled in when the block ends.

    Where the operating system cannot reset its high-water mark (it is not Linux), an earlier
    peak of the process hides a lower one of the block.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.start = torch.cuda.memory_allocated(device)
    else:
        peak.start = _reset_high_water_mark()
    try:
        yield peak
    finally:
        if device.type == "cuda":
            peak.total = torch.cuda.max_memory_allocated(device)
        else:
            peak.total = _high_water_mark()


def available_memory(device: torch.device) -> int:
    """Return how many bytes could be allocated now, container limits included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    found = [_status(Path("/proc/meminfo"), "MemAvailable")]
    for limit, used in _CGROUP_LIMITS:
        try:
            found.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    known = [value for value in found if value is not None]
    return min(known) if known else 4 * 2**30


def largest_batch(trial: Callable[[int], None], limit: int, device: torch.device) -> int:
    """Find the largest batch that fits: sizes double as long as memory lets them, then fill it.

    Args:
        trial: does the work with a batch of a size.
        limit: the largest size of use.
        device: where ``trial`` works.

    Returns:
        A size in [1, limit] whose trial stayed within 60 % of the memory available on a CPU, 90 %
        on a GPU.

    Raises:
        DreamkitError: not even one fits.
    """
    budget = MEMORY_SHARE.get(device.type, 0.6) * available_memory(device)
    # Every trial is held against the start of the first: allocators keep what a trial has freed.
    start = None

    def fits(size: int) -> int | None:
        """Return how many would fit, by a trial of ``size``; None if that does not."""
        nonlocal start
        try:
            with peak_memory(device) as peak:
                trial(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        start = peak.start if start is None else start
        used = peak.total - start
        return None if used > budget else size * int(budget) // max(1, used)

    size = min(8, limit)
    while (room := fits(size)) is None:
        if size == 1:
            raise DreamkitError(
                "not even one image fits in memory: choose a smaller size", ("batch_size",)
            )
        size //= 2
    while size < limit and room is not None and room > size:
        following = min(2 * size, limit)
        if following > room:
            following = max(size + 1, room // 8 * 8)
        room = fits(following)
        if room is None or following < 2 * size:
            return following if room is not None else size
        size = following
    return size


def _reset_high_water_mark() -> int:
    """Forget earlier peaks, where Linux allows it, and return what is in use now."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return _high_water_mark()
    return _status(_PROCESS / "status", "VmRSS") or _high_water_mark()


def _high_water_mark() -> int:
    known = _status(_PROCESS / "status", "VmHWM")
    if known is not None:
        return known
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(path: Path, name: str) -> int | None:
    """Return a line of a file of the kernel's, ``name: 123 kB``, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
