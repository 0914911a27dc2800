"""Ending a run where nothing is lost by it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TWICE_SECONDS = 1.0
"""Schedulers and torchrun both pass a signal on: what comes again within this time is the same."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Lets the first SIGINT or SIGTERM end a run after the step in hand; the second, at once."""

    def __init__(self) -> None:
        self._when = 0.0
        self.signal: signal.Signals | None = None
        """What came, if one did."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for as long as the block lasts, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._when > TWICE_SECONDS:
                raise KeyboardInterrupt
            return
        self._when = now
        self.signal = signal.Signals(number)
        if os.environ.get("RANK", "0") == "0":  # not once for every rank
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status of a run that ended so: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)
