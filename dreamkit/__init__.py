"""dreamkit: move knowledge out of a trained network when its training data is gone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dreamkit.errors import DreamkitError
from dreamkit.registry import hookimpl
from dreamkit.version import __version__

if TYPE_CHECKING:
    from dreamkit.api.distill import distill
    from dreamkit.api.dreams import Dreams, load_dreams
    from dreamkit.api.extend import extend
    from dreamkit.api.invert import invert
    from dreamkit.api.judge import judge
    from dreamkit.api.load import load_teacher
    from dreamkit.api.prune import prune
    from dreamkit.api.quantize import quantize
    from dreamkit.api.recover import recover
    from dreamkit.api.results import (
        Distilled,
        Extended,
        Judgement,
        Pruned,
        Quantized,
        Recovered,
    )
    from dreamkit.card import Card
    from dreamkit.students import load_student
    from dreamkit.types import Teacher

__all__ = [
    "Card",
    "Distilled",
    "DreamkitError",
    "Dreams",
    "Extended",
    "Judgement",
    "Pruned",
    "Quantized",
    "Recovered",
    "Teacher",
    "__version__",
    "distill",
    "extend",
    "hookimpl",
    "invert",
    "judge",
    "load_dreams",
    "load_student",
    "load_teacher",
    "prune",
    "quantize",
    "recover",
]

_HOMES = {
    "Card": "dreamkit.card",
    "Distilled": "dreamkit.api.results",
    "Dreams": "dreamkit.api.dreams",
    "Extended": "dreamkit.api.results",
    "Judgement": "dreamkit.api.results",
    "Pruned": "dreamkit.api.results",
    "Quantized": "dreamkit.api.results",
    "Recovered": "dreamkit.api.results",
    "Teacher": "dreamkit.types",
    "distill": "dreamkit.api.distill",
    "extend": "dreamkit.api.extend",
    "invert": "dreamkit.api.invert",
    "judge": "dreamkit.api.judge",
    "load_dreams": "dreamkit.api.dreams",
    "load_student": "dreamkit.students",
    "load_teacher": "dreamkit.api.load",
    "prune": "dreamkit.api.prune",
    "quantize": "dreamkit.api.quantize",
    "recover": "dreamkit.api.recover",
}


def __getattr__(name: str) -> Any:
    # These need torch, which takes seconds to import; listing plugins does not.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dreamkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
