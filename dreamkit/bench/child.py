"""One teacher measured in a process of its own, which is killed when its time is up.

It tells each figure as it is known: a teacher that hangs, crashes or takes all memory costs one
row's figures.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dreamkit.bench.measure import Task, measure
from dreamkit.bench.results import TeacherRow

_EXIT_SECONDS = 5.0
_FIRST_TO_BE_KILLED = b"1000"


def measure_in_child(task: Task, limit_seconds: float) -> TeacherRow:
    """Measure a teacher in a fresh process, for so long; what it had told by then is kept."""
    row = TeacherRow(task.source, task.model, limit_seconds=limit_seconds)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    start = time.monotonic()
    arguments = (task, time.time() + limit_seconds, sender)
    process = context.Process(target=_work, args=arguments, daemon=True)
    with _deaf_to_interrupts():
        process.start()
    sender.close()  # the child has its own, and its end is seen only if there is no other
    stage, finished = "starting", False
    try:
        while not finished:
            if not receiver.poll(max(0.0, start + limit_seconds - time.monotonic())):
                spent = f"ran out of time ({limit_seconds:g} s) while {stage}"
                row.take({"reason": spent, "cut_short": "time"})
                break
            known: dict[str, Any] | None = receiver.recv()
            if known is None:
                finished = True
            else:
                stage = known.pop("stage", stage)
                row.take(known)
    except (EOFError, OSError):
        process.join(_EXIT_SECONDS)
        row.take({"reason": f"{_death(process.exitcode)} while {stage}"})
    finally:
        process.kill()
        process.join()
        receiver.close()
    row.seconds = round(time.monotonic() - start, 2)
    return row


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, so that a process started meanwhile does; its parent is who stops it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _death(exit_status: int | None) -> str:
    if exit_status is None or exit_status >= 0:
        return f"its process ended with status {exit_status}"
    name = signal.Signals(-exit_status).name
    likely = ", most likely for lack of memory," if name == "SIGKILL" else ""
    return f"its process was ended by {name}{likely}"


def _work(task: Task, deadline: float, sender: Connection) -> None:
    """Do a child's work: measure, tell, and say that this was all."""
    with contextlib.suppress(OSError):  # only Linux has it: what takes all memory goes first
        Path("/proc/self/oom_score_adj").write_bytes(_FIRST_TO_BE_KILLED)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' warnings and download bars would tear the lines apart
        os.dup2(silence, stream)
    measure(task, deadline, sender.send)
    sender.send(None)
