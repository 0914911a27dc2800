"""How much memory something takes, and how much there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from dreamkit.allocator import give_back
from dreamkit.errors import OutOfMemory
from dreamkit.out_of_memory import give_back_memory, is_out_of_memory

MEMORY_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of the memory available, what ``batch_size: auto`` plans with; the rest is for others."""
_ROOT = Path("/")
_PROCESS = "proc/self"
_UNKNOWN = 4 * 2**30
"""Bytes that are taken for available where the system tells nothing."""


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
    peak of the process hides a lower one of the block. What the process keeps of freed memory is
    given back first: it would hide what the block takes of it.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.start = torch.cuda.memory_allocated(device)
    else:
        give_back()
        peak.start = _reset_high_water_mark()
    try:
        yield peak
    finally:
        if device.type == "cuda":
            peak.total = torch.cuda.max_memory_allocated(device)
        else:
            peak.total = _high_water_mark()


def available_memory(device: torch.device, root: Path = _ROOT) -> int:
    """Return how many bytes could be allocated now.

    On a CPU the least of what the machine has left, what the process's control group and those
    above it have (versions 1 and 2), what ``ulimit -v`` and ``-d`` leave, and what Slurm granted.

    Args:
        device: where.
        root: of the file system in which Linux tells all that.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    machine = _status(root / "proc/meminfo", "MemAvailable")
    found = [_half_of_the_machine() if machine is None else machine]
    found += [*_left_to_groups(root), *_left_by_ulimit(root), *_left_by_slurm(root, os.environ)]
    return max(0, min(found))


def _half_of_the_machine() -> int:
    """Return a guess where the system does not say what is available."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # Windows
        return _UNKNOWN


def _left_to_groups(root: Path) -> Iterator[int]:
    """Yield what each control group around the process may still take."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / _PROCESS / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mounts, limits = [mounted, mounted / "unified"], ["memory.max", "memory.high"]
            used, cached = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mounts, limits = [mounted / "memory"], ["memory.limit_in_bytes"]
            used, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host, and the root the group's own.
        for group in (PurePosixPath(name), *PurePosixPath(name).parents):
            for folder in (mount / str(group).lstrip("/") for mount in mounts):
                taken = _number(folder / used)
                if taken is None:
                    continue
                taken -= _row(folder / "memory.stat", cached) or 0  # goes when room is needed
                known = (_number(folder / limit) for limit in limits)
                yield from (limit - taken for limit in known if limit is not None)


def _left_by_ulimit(root: Path) -> Iterator[int]:
    """Yield what the process's own limits leave of its address space and its data."""
    for name, used in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        for line in _lines(root / _PROCESS / "limits"):
            limit = line.removeprefix(name).split()
            if line.startswith(name) and limit[0].isdecimal():
                yield int(limit[0]) - (_status(root / _PROCESS / "status", used) or 0)


def _left_by_slurm(root: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Yield what a job of Slurm may still take; it ends those that take more."""
    node, cpu = environment.get("SLURM_MEM_PER_NODE", ""), environment.get("SLURM_MEM_PER_CPU", "")
    granted = int(node) if node.isdecimal() else 0
    if not granted and cpu.isdecimal():
        cpus = environment.get("SLURM_CPUS_ON_NODE", "")
        granted = int(cpu) * (int(cpus) if cpus.isdecimal() else 1)
    if granted:  # in MiB; 0 is all of the machine
        yield granted * 2**20 - (_status(root / _PROCESS / "status", "VmRSS") or 0)


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
        OutOfMemory: not even one fits.
    """
    give_back_memory()  # what is kept of freed memory is available, and the system cannot know
    budget = MEMORY_SHARE.get(device.type, 0.6) * available_memory(device)
    # Every trial is held against the start of the first: allocators keep what a trial has freed.
    start = None

    def fits(size: int) -> int | None:
        """Return how many would fit, by a trial of ``size``; None if that does not."""
        nonlocal start
        try:
            with peak_memory(device) as peak:
                trial(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short = True
        else:
            short = False
        if short:  # here, where the error no longer holds what it filled
            give_back_memory()
            return None
        start = peak.start if start is None else start
        used = peak.total - start
        return None if used > budget else size * int(budget) // max(1, used)

    size = min(8, limit)
    while (room := fits(size)) is None:
        if size == 1:
            raise OutOfMemory(
                "not even one image fits in memory: dream smaller images (the size in stages), or "
                "use a device with more"
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
        (_ROOT / _PROCESS / "clear_refs").write_text("5")
    except OSError:
        return _high_water_mark()
    return _status(_ROOT / _PROCESS / "status", "VmRSS") or _high_water_mark()


def _high_water_mark() -> int:
    known = _status(_ROOT / _PROCESS / "status", "VmHWM")
    if known is not None:
        return known
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of the kernel's; none where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _status(path: Path, name: str) -> int | None:
    """Return a line of a file of the kernel's, ``name: 123 kB``, in bytes."""
    kilobytes = _row(path, f"{name}:")
    return None if kilobytes is None else kilobytes * 1024


def _row(path: Path, name: str) -> int | None:
    """Return the number that stands behind a name in a file of the kernel's."""
    for line in _lines(path):
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None


def _number(path: Path) -> int | None:
    """Return the number that a file of the kernel's holds; None where it is not there, or "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None
