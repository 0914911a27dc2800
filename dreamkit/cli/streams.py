"""Standard streams as people have them: of any encoding, closed, or with nobody reading."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, cast

PLAIN = "dreamkit.plain"
"""The error handler under which characters that an encoding lacks are written in others."""
_INSTEAD = {
    **{"→": "->", "←": "<-", "…": "...", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-"},  # noqa: RUF001
    **{"≤": "<=", "≥": ">=", "≈": "~", "‖": "||", "∂": "d", "Σ": "sum", "ℓ": "l", "′": "'"},  # noqa: RUF001
    **{"²": "^2", "³": "^3", "½": "1/2", "“": '"', "”": '"', "‘": "'", "’": "'", "•": "-"},  # noqa: RUF001
}
_LEAST_COLUMNS = 20
"""Of fewer nothing can be read; terminals that do not know their width say 0."""


def plainly(error: UnicodeError) -> tuple[str, int]:
    r"""Stand in for characters that an encoding lacks, e.g. ``->`` for an arrow.

    Letters of names and paths are told exactly, as ``\xfc``.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_instead, lacking)), error.end


def _instead(character: str) -> str:
    if character in _INSTEAD:
        return _INSTEAD[character]
    if unicodedata.combining(character):  # the hat of x̂: the letter has been written
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name:
        return name.rpartition(" ")[2].lower()
    return character.encode("ascii", "backslashreplace").decode()


class Lasting:
    """A stream that goes on when its reader is gone: what is written then is not kept.

    A run of hours does not end because ``head`` has seen enough.

    Args:
        stream: of a file descriptor.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text; return its length."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._go_on()
            return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._go_on()

    def _go_on(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make whatever is printed in the block go where it can, and fail nowhere."""
    codecs.register_error(PLAIN, plainly)
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) < _LEAST_COLUMNS:
        del os.environ["COLUMNS"]
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # it was closed before the program began
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=PLAIN)
            setattr(sys, name, cast(TextIO, Lasting(stream)))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def restart_in_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has no names for files of others.

    Recipes name files in UTF-8, which an ASCII or Latin-1 file system encoding does not find.
    What is printed stays in the locale's encoding.
    """
    if os.name != "posix" or sys.getfilesystemencoding().lower().replace("-", "") == "utf8":
        return
    if sys.flags.utf8_mode or not sys.orig_argv:
        return
    written = getattr(sys.stdout, "encoding", None) or "ascii"
    environment = {"PYTHONIOENCODING": written, **os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    os.execve(sys.executable, command, environment)
