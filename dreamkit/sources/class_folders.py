"""What lies in a folder of images: its class folders, and the picture files in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamkit.errors import DreamkitError
from dreamkit.sources.classes import in_order, quoted

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif"),
    )
)
"""Of files that are read as pictures; capitals make no difference."""
_NO_CLASS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found"),
        *("system volume information", "__pycache__"),
    )
)
_NO_FILE = frozenset(("thumbs.db", "desktop.ini", "icon\r"))
_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev")
)


@dataclass(frozen=True)
class Found:
    """The picture files of a folder.

    Args:
        files: in order.
        others: how many other files there are by suffix, hidden ones left out.
    """

    files: list[str]
    others: Counter[str]


def class_folders(path: str) -> list[str]:
    """Return the names of the folders in a folder that may be classes.

    Hidden ones are none, nor are those that systems make. Numbers are in the order of numbers,
    other names in the alphabet's.

    Raises:
        DreamkitError: it cannot be read, has none, or has splits (``train`` and ``val``) for them.
    """
    names = in_order(_inside(path))
    if not names:
        flat = pictures(path, deep=False).files
        there = f"holds {len(flat)} images" if flat else "is empty of them"
        raise DreamkitError(
            f"{path}: there is no class folder in it, it {there}; put the images into one folder a "
            "class, or give the folder above it"
        )
    splits = [name for name in names if name.casefold() in _SPLITS]
    holders = [name for name in splits if _inside(os.path.join(path, name))]
    if holders and (len(holders) > 1 or len(holders) == len(names)):
        raise DreamkitError(
            f"{path}: {quoted(holders)} hold class folders of their own; give one of them, such as "
            f"{os.path.join(path, holders[-1])}"
        )
    return names


def holds_folders(path: str) -> bool:
    """Whether there are folders in a folder that may be classes."""
    return bool(_inside(path))


def pictures(path: str, deep: bool = True) -> Found:
    """Return the picture files below a folder, in the order of their paths.

    Hidden files and folders are left out, AppleDouble's ``._name.png`` among them. Links are
    followed, each folder once.

    Args:
        path: the folder.
        deep: look in folders in it too.

    Raises:
        DreamkitError: a folder cannot be read.
    """
    files, others = list[str](), Counter[str]()
    for folder, names in _walk(path) if deep else [next(_walk(path))]:
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                files.append(os.path.join(folder, name))
            elif name.lower() not in _NO_FILE:
                others[suffix or "no suffix"] += 1
    return Found(sorted(files), others)


def misplaced(path: str, names: Sequence[str]) -> str:
    """Return a hint for a folder that is given a level too high; empty if it is not.

    Args:
        path: the folder.
        names: of the class folders in it.
    """
    holders = [name for name in names if _inside(os.path.join(path, name))]
    told = [name for name in holders if name.casefold() in _SPLITS or len(names) == 1]
    return f" (did you mean {os.path.join(path, told[-1])}?)" if told else ""


def _inside(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if _is_class(entry)]
    except OSError as error:
        raise DreamkitError(f"{path} cannot be read: {error.strerror}") from error


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and _is_shown(entry.name)


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _NO_CLASS


def _walk(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder and the names of the files in it that are not hidden."""

    def refuse(error: OSError) -> None:
        raise DreamkitError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for folder, inside, files in os.walk(path, onerror=refuse, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or to another here
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if _is_shown(name))
        yield folder, [name for name in files if not name.startswith(".")]
