"""Code of other people's that a run goes on without: one that raises is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """Return an error's kind and message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Isolated(Generic[T]):
    """Calls each of several objects; one that raises is named once, and not called again.

    Args:
        members: each by the name that a message calls it.
        note: told who is left out, and why.
    """

    def __init__(self, members: Iterable[tuple[str, T]], note: Callable[[str], None]) -> None:
        self._members = dict(enumerate(members))
        self._note = note

    @property
    def left(self) -> list[T]:
        """Those that have not failed."""
        return [member for _, member in self._members.values()]

    def each(self, call: Callable[[T], object]) -> None:
        """Call a function with each that has not failed."""
        for number, (name, member) in list(self._members.items()):
            if number not in self._members:  # it failed meanwhile: a note may come back as an event
                continue
            try:
                call(member)
            except (Exception, SystemExit) as error:  # whatever a stranger's code raises
                del self._members[number]
                self._note(f"{name} failed and is left out from here on: {reason(error)}")
