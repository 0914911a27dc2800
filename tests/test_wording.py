"""Lines that messages are made of."""

from __future__ import annotations

import io

from rich.console import Console

from dreamkit.wording import and_more, first_line, one_line, say


def test_a_line_is_printed_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=10)
    say(console, "[bold] 12 of a long line")
    assert console.file.getvalue() == "[bold] 12 of a long line\n"  # type: ignore[attr-defined]


def test_an_error_on_one_line() -> None:
    error = ValueError("\n first\n  second ")
    assert one_line(error) == "first second"
    assert one_line(error, limit=5) == "first"
    assert first_line(error) == "first"
    assert first_line(error, limit=3) == "fir"


def test_a_long_list_is_cut_short() -> None:
    assert and_more(["a", "b", "c"], 2) == "a, b and 1 more"
    assert and_more(["a", "b"], 2) == "a, b"
    assert and_more([], 2) == ""
