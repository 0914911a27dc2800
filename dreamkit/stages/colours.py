"""Whether dreams have the colours and the contrast of training images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from dreamkit.synthesizers.first_layer import TrainingPixels, chroma, training_pixels
from dreamkit.types import Images, RunLog, Teacher

LOOKED_AT = 1024
"""Images whose pixels are counted at the most, spread over all."""
FARTHEST = 0.12
"""Distance of a channel's mean, of pixels in [0, 1], above which colours are far off.

Real images lie within 0.06 of what the first layer of a network tells that was trained on them.
"""
WIDEST = 1.4
"""Ratio above which contrast or chroma is too high, or below its inverse too low.

Real images have 0.7 to 1.1 of the spread that the first layer tells, and 0.95 of the chroma.
"""
_CALMER = ". More steps help, and a smaller 'colour' of the parameterisation fourier"
_CHUNK = 128


@dataclass(frozen=True)
class Pixels:
    """What stored images are made of, by channel, of pixels in [0, 1].

    Args:
        mean: by channel.
        std: standard deviation by channel, over images and positions.
        chroma: how far they are from grey.
        clipped: share of the values that are 0 or 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    chroma: float
    clipped: tuple[float, ...]


def pixels_of(images: Images) -> Pixels:
    """Count the pixels of stored images, of at most ``LOOKED_AT``."""
    step = -(-len(images) // LOOKED_AT)
    chosen = range(0, len(images), step)
    sums = []
    for first in range(0, len(chosen), _CHUNK):
        stored, _ = images.batch(chosen[first : first + _CHUNK])
        values = stored.double() / 255
        clipped = ((stored == 0) | (stored == 255)).double()
        products = torch.einsum("nchw,ndhw->cd", values, values) / values[0, 0].numel()
        by_channel = torch.stack([values, clipped]).mean((3, 4)).sum(1)
        sums.append(torch.cat([by_channel, products]))
    mean, share, *rows = torch.stack(sums).sum(0) / len(chosen)
    covariance = torch.stack(rows) - mean * mean[:, None]
    std = covariance.diagonal().clamp(min=0).sqrt()
    return Pixels(
        tuple(mean.tolist()), tuple(std.tolist()), chroma(covariance), tuple(share.tolist())
    )


def report_colours(images: Images, teacher: Teacher, log: RunLog) -> None:
    """Put the pixels of dreams beside what the first layer tells of training images.

    Args:
        images: dreamed.
        teacher: from which.
        log: given ``details["pixels"]``, metrics, and a note on what is far off.
    """
    with log.progress("comparing colours", 1):
        dreams, training = pixels_of(images), training_pixels(teacher)
    log.details["pixels"] = {
        "dreams": asdict(dreams),
        "training": None if training is None else asdict(training),
    }
    log.metrics["synthesis.clipped"] = sum(dreams.clipped) / len(dreams.clipped)
    if training is not None:
        log.metrics["synthesis.contrast"] = contrast(dreams, training)
        if training.chroma > 0:  # else there is one channel
            log.metrics["synthesis.chroma"] = dreams.chroma / training.chroma
        for doubt in doubts(dreams, training):
            log.note(doubt)


def contrast(dreams: Pixels, training: TrainingPixels) -> float:
    """Return how many times as wide dreams' pixels spread as training images', over channels."""
    pairs = zip(dreams.std, training.std, strict=True)
    return sum(own / told for own, told in pairs) / len(training.std)


def doubts(dreams: Pixels, training: TrainingPixels) -> list[str]:
    """Return a sentence for each thing that is far off: colours, contrast."""
    found = []
    off = max(abs(own - told) for own, told in zip(dreams.mean, training.mean, strict=True))
    if off > FARTHEST:
        found.append(
            f"colours: the dreams' mean is {_numbers(dreams.mean)}, where the network's first "
            f"layer tells {_numbers(training.mean)} of training images. Regularize by bn_feature "
            "in its form 'relative', with more weight or more steps"
        )
    if training.chroma > 0 and _is_far(ratio := dreams.chroma / training.chroma):
        found.append(
            f"colours: the dreams' pixels are {ratio:.1f} times as far from grey as the network's "
            "first layer tells of training images" + (_CALMER if ratio > 1 else "")
        )
    if _is_far(ratio := contrast(dreams, training)):
        clipped = 100 * sum(dreams.clipped) / len(dreams.clipped)
        found.append(
            f"contrast: the dreams' pixels spread {ratio:.1f} times as wide as the network's first "
            "layer tells of training images"
            + (f", and {clipped:.0f} % of them are at 0 or 255" if ratio > 1 else "")
        )
    return found


def _is_far(ratio: float) -> bool:
    return not 1 / WIDEST <= ratio <= WIDEST


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.2f}' for value in values)})"
