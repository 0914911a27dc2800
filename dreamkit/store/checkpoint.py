"""A training run's last state: one safetensors file, without pickle, replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamkit.errors import StoreError
from dreamkit.flat_state import hash_state
from dreamkit.store.atomic import write_atomically

FORMAT = 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state; a crash at any point leaves the one before or this one.

    Args:
        path: its folder is made if need be.
        tensors: any number; moved to the CPU.
        facts: plain data.

    Raises:
        StoreError: the folder cannot be made.
        RunDirectoryError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be made: {error.strerror}") from error
    # Cloned: tied weights share storage, which safetensors refuses.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps({"format": FORMAT, "facts": dict(facts), "sha256": hash_state(state)})
    write_atomically(path, safetensors.torch.save(state, {"dreamkit": text}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and facts of a state, or None if there is none.

    Raises:
        StoreError: the file is damaged or of another format.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["dreamkit"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = described["format"] == FORMAT and described["sha256"] == hash_state(state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {_FIX}") from error
    if not intact:
        raise StoreError(f"{path} is damaged or of another version; {_FIX}")
    return state, described["facts"]


_FIX = "delete it, and the same command trains from the start; dreams are kept"
