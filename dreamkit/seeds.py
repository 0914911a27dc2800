"""Streams of random numbers: each purpose has its own, and all come from a run's seed."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, purpose: str) -> int:
    """Return the seed of one purpose, in [0, 2^63); purposes and neighbouring seeds share nothing.

    Args:
        seed: the run's.
        purpose: what is drawn, as ``"statistics"``.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return the random numbers of one purpose, on the CPU; as of ``derived_seed``."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose))
