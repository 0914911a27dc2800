"""Tables of options: read off constructors and docstrings, for the command line and the docs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from dreamkit.plugins import build_registries
from dreamkit.recipe.signature import OptionRow, documentation, option_rows
from dreamkit.registry import KINDS, EntriesOf, EntryOf, Term, TermsOf


@dataclass(frozen=True)
class Inner:
    """Inside.

    Args:
        steps: how many.
        flip: whether. Not said in a row.
    """

    steps: Annotated[int, Field(ge=1)]
    flip: bool = False


@dataclass(frozen=True)
class Outer:
    """Everything an option can be.

    Args:
        rate: of learning, e.g. 0.1; null is the
            default's. Not said in a row.
        mode: how.
        size: side of a square, or [height, width].
        parts: in turn.
        inner: what is inside.
        entry: one of them.
        losses: the weighted ones.
        trackers: all of them.
        path: where.
    """

    mode: Literal["a", "b"]
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    size: Annotated[int, Field(ge=1)] | tuple[int, int] = 8
    parts: Annotated[tuple[Inner, ...], Field(min_length=1)] = (Inner(3), Inner(2, True))
    inner: Inner | None = None
    entry: Annotated[Any, EntryOf("parameterisations")] = field(default_factory=lambda: Inner(1))
    losses: Annotated[tuple[Term[Any], ...], TermsOf("losses")] = (Term("x", 0.5, 1),)
    trackers: Annotated[tuple[Any, ...], EntriesOf("trackers")] = ()
    path: Path = Path("a/b")


def test_a_row_for_every_option() -> None:
    assert option_rows(Inner) == [
        OptionRow("steps", "integer", "required", ">= 1", "how many", None),
        OptionRow("flip", "true | false", "false", "", "whether", None),
    ]
    rows = {row.name: row for row in option_rows(Outer)}
    assert list(rows) == list(Outer.__dataclass_fields__)
    assert {name: row.accepts for name, row in rows.items()} == {
        "mode": '"a" | "b"',
        "rate": "number | null",
        "size": "integer | [integer, integer]",
        "parts": "list of Inner",
        "inner": "Inner | null",
        "entry": "one of the parameterisations",
        "losses": "list of weighted losses",
        "trackers": "list of trackers",
        "path": "path",
    }
    assert {name: row.default for name, row in rows.items()} == {
        "mode": "required",
        "rate": "null",
        "size": "8",
        "parts": '[{"steps": 3}, {"steps": 2, "flip": true}]',
        "inner": "null",
        "entry": '{"steps": 1}',
        "losses": '{"x": 0.5}',
        "trackers": "[]",
        "path": '"a/b"',
    }
    assert rows["rate"].range == "> 0, <= 1"
    assert rows["rate"].help == "of learning, e.g. 0.1; null is the default's"
    assert rows["parts"].range == "length >= 1"
    assert rows["parts"].nested is rows["inner"].nested is Inner
    assert rows["mode"].nested is None


def test_a_class_without_options_has_no_rows() -> None:
    assert option_rows(type("Empty", (), {})) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_an_entry_has_a_complete_row(kind: str) -> None:
    registry = build_registries()[kind]
    classes = [registry.resolve(name) for name in registry]
    for cls in classes:  # grows by the classes inside
        for row in option_rows(cls):
            assert row.help, f"{cls.__name__}.{row.name}"
            assert re.search(rf"^ {{4}}{row.name}: ", documentation(cls), re.MULTILINE)
            assert row.accepts
            assert row.default
            assert "object at 0x" not in row.default
            if row.nested is not None and row.nested not in classes:
                classes.append(row.nested)
