"""How messages are worded: long lists cut short, errors on one line, text printed as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours for numbers, no breaks of long lines."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def one_line(error: object, limit: int = 300) -> str:
    """Return an error's message with its line breaks taken out, cut at ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def first_line(error: object, limit: int = 200) -> str:
    """Return the first line of an error's message, cut at ``limit`` characters."""
    return str(error).strip().partition("\n")[0][:limit]


def and_more(names: Sequence[str], shown: int = 8) -> str:
    """Return the first of some names, and how many there are beside: ``a, b and 3 more``."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
