"""dreamkit: move knowledge out of a trained network when its training data is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamkit.registry import hookimpl
from dreamkit.version import __version__

if TYPE_CHECKING:
    from dreamkit.deploy.students import load_student

__all__ = ["__version__", "hookimpl", "load_student"]


def __getattr__(name: str) -> Any:
    # Loading a student needs torch, which takes seconds to import; listing plugins does not.
    if name == "load_student":
        from dreamkit.deploy.students import load_student

        return load_student
    raise AttributeError(f"module 'dreamkit' has no attribute {name!r}")
