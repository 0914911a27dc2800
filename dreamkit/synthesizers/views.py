"""Random views of a batch, the same for all of its images: rolled, and mirrored or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class View(torch.autograd.Function):
    """Images rolled and mirrored by tensors, so that shapes and graphs stay the same.

    A permutation of pixels: its gradient is gathered by the inverse, not scattered.
    """

    @staticmethod
    def forward(images: Tensor, draw: Tensor) -> Tensor:
        """Roll by draw[0] rows and draw[1] columns, then mirror left to right if draw[2]."""
        moved: Tensor = _moved(images, draw)
        return moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep what was drawn."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Undo it."""
        (draw,) = ctx.saved_tensors
        # A mirrored roll is its own inverse; a plain one is undone by the opposite shift.
        back = torch.stack([-draw[0], torch.where(draw[2] > 0, draw[1], -draw[1]), draw[2]])
        return _moved(gradient, back), None


@torch.library.custom_op("dreamkit::moved", mutates_args=())
def _moved(images: Tensor, draw: Tensor) -> Tensor:
    """Return images rolled and mirrored.

    An operation that the compiler cannot look into: fused with what reads its result, say the
    eight shifted copies of total variation, every one of them would gather for itself.
    """
    if draw.device.type != "cpu":
        return gathered(images, draw)
    down, right, mirrored = draw.tolist()  # on a CPU there is nothing to wait for
    moved = torch.roll(images.contiguous(), shifts=(down, right), dims=(2, 3))
    return moved.flip(3) if mirrored else moved


@_moved.register_fake
def _(images: Tensor, draw: Tensor) -> Tensor:
    return images.new_empty(images.shape)


def gathered(images: Tensor, draw: Tensor) -> Tensor:
    """Return images rolled and mirrored by numbers that stay on the device."""
    height, width = images.shape[2:]
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    across = torch.where(draw[2] > 0, width - 1 - across, across)
    rows, columns = (down - draw[0]) % height, (across - draw[1]) % width
    return images.contiguous()[:, :, rows[:, None], columns]


def draw_views(
    steps: int, shift: tuple[int, int], flip: bool, generator: torch.Generator
) -> Tensor:
    """Draw each step's roll and mirror.

    Args:
        steps: how many.
        shift: most rows and columns to roll by, either way.
        flip: mirror half of the steps.
        generator: a CPU generator.

    Returns:
        (steps, 3) int64: rows, columns, and 1 to mirror.
    """
    draws = [torch.randint(-s, s + 1, (steps,), generator=generator) for s in shift]
    mirrored = torch.rand(steps, generator=generator) < 0.5 if flip else torch.zeros(steps)
    return torch.stack([*draws, mirrored.long()], dim=1)
