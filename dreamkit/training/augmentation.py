"""Random views of training images: every image of a batch gets a draw of its own.

Draws come from the generator alone, and from its device; images may lie on another.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Border = Literal["reflect", "zeros"]


def random_crop(
    images: Tensor, padding: int, generator: torch.Generator, border: Border = "reflect"
) -> Tensor:
    """Shift each image by at most ``padding`` pixels along both axes, all shifts equally likely.

    The same as padding on all four sides and cutting out a window of the old size.

    Args:
        images: (N, C, H, W), stored or normalised; gradients flow to them.
        padding: >= 0; with ``reflect`` less than H and W.
        generator: draws 2N integers.
        border: what comes in from outside: the image mirrored at its edge pixels, or zeros, which
            are black in stored images and the mean in normalised ones (He et al. 2016).

    Returns:
        (N, C, H, W) in channels-last memory.

    Raises:
        ValueError: the padding does not fit the images.
    """
    height, width = images.shape[2:]
    if padding < 0 or (border == "reflect" and padding >= min(height, width)):
        raise ValueError(f"padding {padding} does not fit images of {height} by {width}")
    rows, columns = (
        _drawn(2 * padding + 1, images, generator) + torch.arange(side, device=images.device)
        for side in (height, width)
    )
    if border == "zeros":
        images = F.pad(images, (padding,) * 4)
    else:
        rows, columns = _mirrored(rows - padding, height), _mirrored(columns - padding, width)
    return _windows(images, rows, columns)


def random_window(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut a window out of each image, all places equally likely.

    Args:
        images: (N, C, H, W), stored or normalised; gradients flow to them.
        size: of the window's sides; at most H and W.
        generator: draws 2N integers.

    Returns:
        (N, C, size, size) in channels-last memory.

    Raises:
        ValueError: the images are smaller.
    """
    height, width = images.shape[2:]
    if size > min(height, width):
        raise ValueError(f"images of {height} by {width} have no window of {size} pixels a side")
    rows, columns = (
        _drawn(side - size + 1, images, generator) + torch.arange(size, device=images.device)
        for side in (height, width)
    )
    return _windows(images, rows, columns)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image (N, C, H, W) left to right with probability ½."""
    shape = (len(images), 1, 1, 1)
    draw = torch.randint(2, shape, generator=generator, device=generator.device)
    return torch.where(draw.to(images.device) > 0, images.flip(3), images)


def random_paste(
    images: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a rectangle of another image of the batch into some, each at its place in both.

    Its sides are a quarter to three quarters of the image's. (Yun et al., "CutMix", ICCV 2019,
    paste the same rectangle into all.)

    Args:
        images: (N, C, H, W), stored or normalised.
        share: of the images, each chosen with this probability.
        generator: of all draws.

    Returns:
        The images (N, C, H, W), of each which other it has a part of (N,), and its own share of
        the pixels (N,), which is 1 where nothing was pasted.
    """
    count, device = len(images), images.device
    others = torch.randperm(count, generator=generator, device=generator.device).to(device)
    drawn = torch.rand(count, generator=generator, device=generator.device).to(device)
    inside = (drawn < share)[:, None, None]
    for side, shape in zip(images.shape[2:], ((count, -1, 1), (count, 1, -1)), strict=True):
        least, most = side // 4, side - side // 4
        length = least + _drawn(most - least + 1, images, generator)
        at = torch.rand(length.shape, generator=generator, device=generator.device).to(device)
        first = (at * (side - length + 1)).long()
        line = torch.arange(side, device=device)
        inside = inside & ((line >= first) & (line < first + length)).view(shape)
    pasted = torch.where(inside[:, None], images[others], images)
    return pasted, others, 1 - inside.float().mean((1, 2))


def drawn_share(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(α, α), as a share of two gamma variables: torch's own takes no generator."""
    variables = torch.full((2,), alpha, dtype=torch.float64)
    pair = torch._standard_gamma(variables, generator=generator)
    return float(pair[0] / pair.sum().clamp(min=1e-300))


def _drawn(below: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an integer in [0, below) for each image; return them as (N, 1)."""
    shape = (len(images), 1)
    draw = torch.randint(below, shape, generator=generator, device=generator.device)
    return draw.to(images.device)


def _windows(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return of each image the rows (N, H') and the columns (N, W') that are named."""
    batch = torch.arange(len(images), device=images.device)
    # Gathered axes come first, so that this is (N, H, W, C).
    window = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return window.permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Fold positions in (-size, 2·size - 1) back into [0, size)."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
