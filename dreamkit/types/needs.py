"""What an entry declares that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from dreamkit.errors import did_you_mean


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
