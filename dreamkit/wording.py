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


def duration(seconds: float) -> str:
    """Write a time the way people say it: ``40 s``, ``12 min``, ``3 h 10 min``, ``2 d 4 h``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
