"""Dreams as picture files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dreamkit.errors import StoreError
from dreamkit.store.dreams import DreamStore
from dreamkit.types import Images


def export_dreams(store: DreamStore, folder: Path, class_names: Sequence[str] | None) -> int:
    """Write a store's dreams as PNG files; see ``write_pictures``.

    Returns:
        How many were written.
    """
    content = store.open()
    return write_pictures(content, folder, content.teacher_logits.shape[1], class_names)


def write_pictures(
    content: Images, folder: Path, classes: int, class_names: Sequence[str] | None
) -> int:
    """Write images as PNG files, ``folder/<class>/<number>.png``, which ``ImageFolder`` reads.

    Classes are named by zero-padded number, and by name where known, so that alphabetical
    order is the teacher's output order.

    Args:
        content: labelled.
        folder: new or empty.
        classes: how many there are.
        class_names: in output order.

    Returns:
        How many were written.

    Raises:
        StoreError: the folder is not empty or cannot be written to.
    """
    check_empty(folder)
    try:
        digits = len(str(classes - 1))
        for number in range(len(content)):
            (image,), (label,) = (part.unbind() for part in content.batch([number]))
            name = f"{int(label):0{digits}d}"
            if class_names is not None:
                safe = "".join(c if c.isalnum() else "_" for c in class_names[int(label)])
                name = f"{name}_{safe}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number:06d}.png")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}") from error
    return len(content)


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        StoreError: it does.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty; choose another folder")
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror}") from error
