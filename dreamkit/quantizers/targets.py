"""The processors that an INT8 file may meet."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Target = Literal["portable", "vnni", "arm", "tensorrt", "auto"]
_VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}


@dataclass(frozen=True)
class Processor:
    """What of this machine's processor matters for integers.

    Args:
        machine: as ``platform.machine`` says it.
        flags: of x86 on Linux; empty where they are not known.
    """

    machine: str
    flags: frozenset[str]

    @property
    def is_arm(self) -> bool:
        """Whether it is a 64-bit ARM."""
        return self.machine.lower() in {"aarch64", "arm64"}

    @property
    def has_vnni(self) -> bool:
        """Whether products of bytes are added in 32 bits."""
        return bool(_VNNI & self.flags)

    @property
    def target(self) -> Literal["portable", "vnni", "arm"]:
        """The target that suits it; ``portable`` where that cannot be told."""
        if self.is_arm:
            return "arm"
        return "vnni" if self.has_vnni else "portable"

    def describe(self) -> dict[str, Any]:
        """Return what a file's JSON says of it."""
        return {"machine": self.machine, "vnni": self.has_vnni}


def resolved(target: Target) -> Target:
    """Return a target, with ``auto`` told."""
    return this_processor().target if target == "auto" else target


def told(target: Target) -> str | None:
    """Return what the user must know of a target on this machine, if anything."""
    here = this_processor()
    if target == "auto":
        return f"the INT8 file is for this machine's processor: target {here.target}"
    if target == "vnni" and not here.has_vnni and not here.is_arm:
        return (
            "this processor has no VNNI, or does not tell: a file for 'vnni' may saturate "
            "here, and what is measured without saturation is what it does on one that has it"
        )
    return None


def this_processor() -> Processor:
    """Return this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return Processor(platform.machine(), frozenset(flags))
