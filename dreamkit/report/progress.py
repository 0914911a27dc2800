"""Where a run stands: bars on a terminal, a line now and then elsewhere, and never long silence."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dreamkit.wording import duration, say

LINE_SECONDS = 8.0
"""Where no bar can move: after as long without a line comes one, whatever a stage is at."""
BEAT_SECONDS = 1.0
"""How often is looked whether a line is due."""
QUICK_SECONDS = 1.0
"""A stage that takes less leaves no trace; one within another does if it took ``LINE_SECONDS``."""


@dataclass
class Stage:
    """A part of a run.

    Args:
        name: what it is called.
        total: units of work.
        start: by the clock.
        before: units that were done when it started, which tell nothing of its pace.
        done: units that are.
        bar: that shows it.
    """

    name: str
    total: int
    start: float
    before: int = 0
    done: int = 0
    bar: TaskID | None = None

    @property
    def share(self) -> str:
        """How far it is, for people."""
        return f"{100 * self.done / max(1, self.total):.0f} %"


class Stages:
    """The stages that a run is in, one within the other, as a console shows them.

    Between two calls of a stage may lie minutes, of a compiler or of a single large layer. So lines
    come from a thread of their own, as the movement of bars does.

    Args:
        console: where people look; None for silence.
        clock: seconds.
    """

    def __init__(
        self, console: Console | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.console = console
        self.clock = clock
        self.open: list[Stage] = []
        self._said = 0.0
        self._lock = threading.RLock()
        self._bars: Progress | None = None
        self._ended: threading.Event | None = None

    @property
    def innermost(self) -> str | None:
        """The name of the stage that a run is in, None between stages."""
        return self.open[-1].name if self.open else None

    def spoke(self) -> None:
        """Take note that something else told people that the run goes on."""
        self._said = self.clock()

    @contextmanager
    def stage(self, name: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
        """Show a stage for as long as the block lasts; what is yielded takes the units done."""
        stage = Stage(name, total, self.clock(), before, before)
        self._begin(stage)
        finished = False
        try:
            yield lambda done: self._advance(stage, done)
            finished = True
        finally:
            self._end(stage, finished)

    def beat(self) -> None:
        """Say where the run stands, if nothing was said for a while."""
        with self._lock:
            if self.open and self.clock() - self._said >= LINE_SECONDS:
                self._say(self._line())

    def _begin(self, stage: Stage) -> None:
        with self._lock:
            if not self.open:
                self.spoke()
                self._start()
            self.open.append(stage)
            if self._bars is not None:
                stage.bar = self._bars.add_task(
                    stage.name, total=stage.total, completed=stage.before
                )

    def _start(self) -> None:
        console = self.console
        if console is None or console.quiet:
            return
        if draws_bars(console):
            self._bars = _bars(console)
            self._bars.start()
            return
        self._ended = threading.Event()
        thread = threading.Thread(target=self._keep_beating, args=(self._ended,), daemon=True)
        with suppress(RuntimeError):  # none can be started: lines come with the steps alone
            thread.start()

    def _keep_beating(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            self.beat()

    def _advance(self, stage: Stage, done: int) -> None:
        stage.done = done
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, completed=done)
        elif self._ended is not None and 0 < done < stage.total:
            self.beat()

    def _end(self, stage: Stage, finished: bool) -> None:
        with self._lock:
            self.open.remove(stage)
            seconds = self.clock() - stage.start
            quick = seconds < (LINE_SECONDS if self.open else QUICK_SECONDS)
            if self._bars is not None and stage.bar is not None and (quick or self.open):
                self._bars.remove_task(stage.bar)
            if self._ended is not None and finished and not quick:
                self._say(f"{self._within()}{stage.name}: done in {seconds:.1f} s")
            if not self.open:
                self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.live.transient = not self._bars.tasks  # else an empty line is left
            self._bars.stop()
            self._bars = None
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    def _within(self) -> str:
        return "".join(f"{outer.name} {outer.share}: " for outer in self.open)

    def _line(self) -> str:
        *outer, stage = self.open
        around = "".join(f"{known.name} {known.share}: " for known in outer)
        passed = self.clock() - stage.start
        own = stage.done - stage.before
        if own <= 0 or stage.done >= stage.total:
            return f"{around}{stage.name}: {duration(passed)} so far"
        left = duration(passed / own * (stage.total - stage.done))
        return f"{around}{stage.name}: {stage.share} ({stage.done}/{stage.total}), {left} left"

    def _say(self, text: str) -> None:
        if self.console is not None:
            say(self.console, text)
        self.spoke()


def draws_bars(console: Console) -> bool:
    """Whether a bar can move there: on a terminal, and in a notebook that has widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
