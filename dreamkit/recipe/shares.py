"""A list of entries, each with its share, and the one entry that it stands for in a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dreamkit.registry import EntryOf

T = TypeVar("T")
MIX = "mixed"
"""The synthesizer that a list of several stands for."""
SHARE_SCHEMA = {"type": "number", "exclusiveMinimum": 0}


@dataclass(frozen=True)
class MixOf(EntryOf):
    """Annotation marker of a recipe's own option: one entry, or a list that stands for ``MIX``.

    Whoever reads the recipe makes one of the list.
    """

    def _json_schema(self) -> dict[str, Any]:
        entries = {"type": "array", "items": {"$entry": f"#/$defs/shared_{self.kind}"}}
        return {"anyOf": [super()._json_schema(), entries]}


def without_shares(entries: Sequence[Any], one: T) -> tuple[list[Any], list[T] | None]:
    """Return the entries of a list without the ``share`` that each may have, and these shares.

    Args:
        entries: mappings; what is none is left as it is.
        one: stands for a share that is left out.

    Returns:
        The entries, and a share for each; None where no entry has one.
    """
    told = [entry if isinstance(entry, Mapping) else {} for entry in entries]
    rest = [
        {key: value for key, value in entry.items() if key != "share"}
        if isinstance(entry, Mapping)
        else entry
        for entry in entries
    ]
    given = any("share" in entry for entry in told)
    return rest, [entry.get("share", one) for entry in told] if given else None
