"""What a network's first layer tells of the pixels that it was trained on: colours and contrast.

Up to its first BatchNorm a network is as a rule a convolution, so linear in the pixels, and the
stored mean and variance of each of its channels are what that convolution makes of the mean and the
covariance of the training pixels, as training augmented them. With some 30 channels and a few
unknowns these follow by least squares, and what is left over tells whether to believe them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamkit.model_state import device_of, eval_mode, hooked
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.types import Teacher

LENGTHS = tuple(2 ** (half / 2) for half in range(15))
"""Pixels over which the correlation of two pixels may fall to 1/e: from 1 to 128."""
LARGEST_KERNEL = 16
"""Side of the largest receptive field of the first BatchNorm that is looked at."""
LARGEST_MISFIT = 0.35
"""Root mean square of the relative misfit of the variances above which nothing is told."""
_ALIVE = 1e-3
"""Least variance of a channel that counts, as a share of the layer's mean."""
_EXACT = 1e-3
"""Relative departure from a straight line that a linear function may show in float32."""


@dataclass(frozen=True)
class TrainingPixels:
    """What training pixels are like, of pixels in [0, 1].

    Args:
        mean: by channel.
        std: standard deviation by channel.
        chroma: how far they are from grey.
        misfit: of the variances, a root mean square of relative errors; 0 for a perfect fit.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    chroma: float
    misfit: float


@dataclass(frozen=True)
class _Linear:
    """What a network is up to its first BatchNorm: kernels (O, C, k, l), and by position.

    Args:
        kernels: in the middle of the image.
        slopes: (O, C), of the mean over positions in a channel's colour.
        offset: (O,), of the mean over positions.
    """

    kernels: Tensor
    slopes: Tensor
    offset: Tensor


def training_pixels(teacher: Teacher) -> TrainingPixels | None:
    """Return what the first BatchNorm's statistics tell of the training pixels.

    Covariances are taken to be those of channels times exp(-distance / length), of one length.

    Args:
        teacher: whose network is left as it is.

    Returns:
        None where they cannot be told: there is no BatchNorm, what is before it is not linear, its
        statistics are fewer than the unknowns or do not fit the model (as those of random weights).
    """
    found = _up_to_batch_norm(teacher)
    if found is None:
        return None
    linear, running_mean, running_var = found
    alive = running_var > _ALIVE * running_var.mean()
    channels = linear.slopes.shape[1]
    if int(alive.sum()) <= channels * (channels + 1) // 2:
        return None
    var = running_var[alive]
    sigma = var.sqrt()
    left = linear.slopes[alive] / sigma[:, None]
    right = (running_mean - linear.offset)[alive] / sigma
    mean = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    fits = [_spread(linear.kernels[alive], var, length) for length in LENGTHS]
    misfit, covariance = min(fits, key=lambda fit: fit[0])
    scale = torch.tensor(teacher.card.std, dtype=mean.dtype)
    mean = mean * scale + torch.tensor(teacher.card.mean, dtype=mean.dtype)
    if not misfit <= LARGEST_MISFIT or not bool(((mean >= 0) & (mean <= 1)).all()):
        return None
    covariance = covariance * scale * scale[:, None]
    std = covariance.diagonal().sqrt()
    return TrainingPixels(tuple(mean.tolist()), tuple(std.tolist()), chroma(covariance), misfit)


def chroma(covariance: Tensor) -> float:
    """Return how far pixels are from grey, a root mean square over pixels and channels.

    Args:
        covariance: of the channels, (C, C).
    """
    from_grey = torch.eye(len(covariance), dtype=covariance.dtype) - 1 / len(covariance)
    return float((from_grey @ covariance @ from_grey).diagonal().mean().clamp(min=0).sqrt())


def _spread(kernels: Tensor, var: Tensor, length: float) -> tuple[float, Tensor]:
    """Fit the channels' covariances (C, C); return the misfit and them."""
    count, channels, height, width = kernels.shape
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    near = torch.exp(-torch.cdist(places, places) / length)
    flat = kernels.reshape(count, channels, height * width)
    pairs = torch.einsum("ocp,pq,odq->ocd", flat, near, flat) / var[:, None, None]
    rows, columns = torch.triu_indices(channels, channels)
    design = pairs[:, rows, columns] * torch.where(rows == columns, 1.0, 2.0)
    ones = torch.ones(count, 1, dtype=design.dtype)
    solution = torch.linalg.lstsq(design, ones).solution
    misfit = float((design @ solution - ones).square().mean().sqrt())
    covariance = torch.zeros(channels, channels, dtype=design.dtype)
    covariance[rows, columns] = covariance[columns, rows] = solution[:, 0]
    possible = bool((torch.linalg.eigvalsh(covariance) > 0).all())
    return (misfit if possible else math.inf), covariance


def _up_to_batch_norm(teacher: Teacher) -> tuple[_Linear, Tensor, Tensor] | None:
    """Return a network up to its first BatchNorm if it is linear there, and what that stores."""
    model, size = teacher.model, teacher.card.input_size
    layers = batch_norm_layers(model)
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    colours = torch.eye(size[0])[:, :, None, None].expand(-1, *size)
    images = torch.cat([torch.zeros(1, *size), colours, noise, 2 * noise])
    images = images.to(device_of(model)).requires_grad_()
    try:
        with torch.enable_grad(), eval_mode(model), hooked(layers, _stop):
            model(images)
        return None
    except _Reached as reached:
        layer, seen = reached.layer, reached.seen
    mean, var = _stored(layer)
    untrained = not bool(mean.any()) and bool((var == 1).all())
    if untrained or not bool((mean + var).isfinite().all()):
        return None
    if seen.dim() != 4 or seen.shape[1] != len(mean) or not seen.requires_grad:
        return None
    kernels = _kernels(seen, images) if _is_linear(seen.detach()) else None
    if kernels is None:
        return None
    by_image = seen.detach().cpu().double().mean((2, 3))
    slopes = (by_image[1 : 1 + size[0]] - by_image[0]).T
    return _Linear(kernels, slopes, by_image[0]), mean, var


class _Reached(Exception):
    """Ends a pass at the first BatchNorm, with what that is given."""

    def __init__(self, layer: nn.Module, seen: Tensor) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen


def _stop(name: str, layer: nn.Module, seen: Tensor) -> None:
    raise _Reached(layer, seen)


def _stored(layer: nn.Module) -> tuple[Tensor, Tensor]:
    stored = dict(layer.named_buffers())
    # First to the CPU, here and below: MPS has no float64.
    return stored["running_mean"].cpu().double(), stored["running_var"].cpu().double()


def _is_linear(seen: Tensor) -> bool:
    """Whether twice an image less none makes twice as much; the last three images are these."""
    once, twice = seen[-2] - seen[0], seen[-1] - seen[0]
    return float((twice - 2 * once).abs().max()) <= _EXACT * float(twice.abs().max())


def _kernels(seen: Tensor, images: Tensor) -> Tensor | None:
    """Return how channels in the middle depend on the pixels, (O, C, k, l); None if on many."""
    row, column = seen.shape[2] // 2, seen.shape[3] // 2
    found = torch.stack(
        [
            torch.autograd.grad(channel, [images], retain_graph=True)[0][0]
            for channel in seen[0, :, row, column]
        ]
    )
    used = (found != 0).flatten(0, 1).any(0).nonzero()
    if not len(used):
        return None
    (top, left), (bottom, right) = used.amin(0).tolist(), used.amax(0).tolist()
    if max(bottom - top, right - left) >= LARGEST_KERNEL:
        return None
    return found[:, :, top : bottom + 1, left : right + 1].cpu().double()
