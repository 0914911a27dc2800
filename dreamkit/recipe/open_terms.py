"""Weighted terms that a recipe may leave to whoever has the option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dreamkit.registry import TermsOf

AUTO = "auto"


@dataclass(frozen=True)
class OpenTermsOf(TermsOf):
    """Annotation marker: as ``TermsOf``, or the word ``auto``, which is taken as it is."""

    def _schema(self, core: Any) -> Any:
        return core.with_info_wrap_validator_function(
            lambda value, terms, info: AUTO if is_auto(value) else terms(value),
            super()._schema(core),
        )

    def _json_schema(self) -> dict[str, Any]:
        return {"anyOf": [*super()._json_schema()["anyOf"], {"const": AUTO}]}


def is_auto(value: Any) -> bool:
    """Whether terms are left open; a regularizer's name stands for a list of one."""
    return isinstance(value, str) and value == AUTO
