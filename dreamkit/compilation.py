"""What ``torch.compile`` needs to be told, wherever it is used."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def with_cache_of_its_own(method: Any) -> Callable[..., Any]:
    """Copy a method, code and all: the compiler keeps what it made by code object, and only a few.

    So engines do not crowd each other out, and what one compiled goes when it does.
    """
    function = method.__func__
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return types.MethodType(copied, method.__self__)


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keep the compiler's remarks on other devices from the user's terminal."""
    name_the_cache()
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def name_the_cache() -> None:
    """Say where what is compiled is kept, where the system has no name for the user.

    The compiler calls its folder by that name, and in a container a user may be a number alone.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        place = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))


def reason_of(error: Exception) -> str:
    """Return an error's kind and the first line of its message: a compiler's are long."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
