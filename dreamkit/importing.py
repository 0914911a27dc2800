"""Importing a Python file that a user names."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_file(path: str | Path) -> ModuleType:
    """Run a ``.py`` file as a module of a name of its own, so that equal file names do not meet.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: whatever the file raises.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    name = f"dreamkit_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
