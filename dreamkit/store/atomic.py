"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from dreamkit.distributed import is_first
from dreamkit.errors import RunDirectoryError


def write_atomically(path: Path, content: bytes, by_any_rank: bool = False) -> None:
    """Write a file so that a crash at any point leaves the old one or the new one.

    Args:
        path: its folder is there.
        content: all of it.
        by_any_rank: write it whatever rank this is; else the first alone does.

    Raises:
        RunDirectoryError: the disk is full or the folder cannot be written to.
    """
    if not (by_any_rank or is_first()):
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise RunDirectoryError(
            f"{path} cannot be written: {error.strerror}. Free space or choose another "
            "folder; what was finished is kept"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
