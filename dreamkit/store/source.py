"""The dream store as a source of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dreamkit.card import Card
from dreamkit.errors import MissingPath, StoreError
from dreamkit.store.dreams import DreamStore, holds_dreams
from dreamkit.types import Images, ImageSource, RunContext


def find_store(folder: Path) -> Path:
    """Return the store in a run directory, or the folder itself if it is one."""
    inside = folder / RunContext.DREAMS
    return inside if holds_dreams(inside) else folder


@dataclass(frozen=True)
class Dreams(ImageSource):
    """Dreamed images: this run's own, or those of an earlier run.

    Args:
        path: an earlier run's directory (or its ``dreams`` folder); null dreams afresh.
        allow_foreign: take them though they were dreamed from other weights than the teacher's.
    """

    path: str | None = None
    allow_foreign: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and not holds_dreams(find_store(Path(self.path))):
            raise MissingPath("path", f"no dreams in {self.path}")

    def open(self, card: Card) -> Images:
        """Return the dreams of the earlier run.

        Raises:
            StoreError: no path was given, or they are damaged or not of the teacher's channels.
        """
        if self.path is None:
            raise StoreError(
                "give the path of an earlier run: a run's own dreams are only for training, and "
                "then alone",
                ("path",),
            )
        content = DreamStore(find_store(Path(self.path))).open()
        if content.shape[0] != card.input_size[0]:
            raise StoreError(
                f"{self.path}: the dreams have {content.shape[0]} channels, "
                f"{card.name} takes {card.input_size[0]}"
            )
        return content

    @property
    def takes_foreign(self) -> bool:
        """Whether they may be dreams of other weights than those of the run's teacher."""
        return self.allow_foreign

    def teacher_sha256(self) -> str | None:
        """Return the hash of the weights that the earlier run inverted; None of its own dreams."""
        if self.path is None:
            return None
        found: str | None = DreamStore(find_store(Path(self.path))).settings.get("teacher_sha256")
        return found


def is_own_dreams(source: ImageSource | None) -> bool:
    """Whether a source is the dreams that the run itself makes."""
    return source is None or (isinstance(source, Dreams) and source.path is None)
