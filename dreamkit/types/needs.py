"""What an entry declares that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from dreamkit.errors import DreamkitError, did_you_mean

T = TypeVar("T")


def supplied(value: T | None, need: str, entry: object) -> T:
    """Return what a step holds of what an entry's ``needs`` asks for.

    Args:
        value: as the step holds it.
        need: what is asked for.
        entry: that asks.

    Raises:
        DreamkitError: whoever made the step left it out.
    """
    if value is None:
        raise DreamkitError(
            f"{type(entry).__name__} needs '{need}', and is given a step without it: whoever calls "
            "it has to supply what its 'needs' declare"
        )
    return value


def check_needs(cls: type, known: Sequence[str]) -> None:
    """Refuse a class whose ``needs`` nobody would supply.

    Args:
        cls: an entry's class, or one without ``needs``.
        known: what may be asked for.

    Raises:
        TypeError: ``needs`` is no set, or asks for something unknown, such as a misspelt name.
    """
    declared: object = getattr(cls, "needs", frozenset())
    if not isinstance(declared, frozenset | set):
        example = f'frozenset({{"{known[0]}"}})'
        raise TypeError(f"{cls.__name__}.needs should be a set, such as {example}")
    for need in sorted(map(str, declared)):
        if need not in known:
            raise TypeError(
                f"{cls.__name__}.needs: nothing is called '{need}'{did_you_mean(need, known)} "
                f"(known: {', '.join(known)})"
            )
