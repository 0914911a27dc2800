"""Showing a network a few images of noise, to see what it does with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import device_of
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.teachers.logits import TakeLogits
from dreamkit.wording import one_line


def blank_noise(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Return two images of noise, as normalised pixels are, where a model is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *input_size, generator=generator).to(device_of(model))


def call(model: nn.Module, images: Tensor, role: str) -> Any:
    """Return what a network returns for images.

    Raises:
        TeacherMismatch: it does not take them.
    """
    try:
        return model(images)
    except Exception as error:  # anyone's code
        if is_out_of_memory(error):
            raise
        raise TeacherMismatch(
            f"{role} does not take {_shown(images)}: {one_line(error)}"
        ) from error


def _shown(images: Tensor) -> str:
    count, size = len(images), tuple(images.shape[1:])
    return f"{'an image' if count == 1 else f'{count} images'} of size {size}"


def add_hook(model: nn.Module, hook: TakeLogits, role: str) -> None:
    """Let a hook take the logits out of what a network returns.

    Raises:
        TeacherMismatch: it takes none.
    """
    try:
        model.register_forward_hook(hook)
    except RuntimeError as error:
        raise TeacherMismatch(f"{role}: {type(model).__name__} takes no hooks: {error}") from error
