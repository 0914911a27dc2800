"""Telling listeners what happens in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dreamkit.isolation import Isolated

if TYPE_CHECKING:  # they come with torch, which listing plugins does without
    from dreamkit.types.events import Event

Listener = Callable[["Event"], object]
"""What is called with every event."""


class EventEmitter(Isolated[Listener]):
    """Tells its listeners of events; one that raises is named once, and told no more.

    Args:
        members: each listener by the name that a message calls it.
        note: told who is left out, and why.
    """

    def emit(self, event: Event) -> None:
        """Tell every listener of an event, in turn."""
        self.each(lambda listener: listener(event))
