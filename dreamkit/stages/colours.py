"""Whether dreams have the colours and the contrast of training images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from dreamkit.stages.first_layer import TrainingPixels, training_pixels
from dreamkit.types import Images, RunLog, Teacher

LOOKED_AT = 1024
"""Images whose pixels are counted at the most, spread over all."""
FARTHEST = 0.12
"""Distance of a channel's mean, of pixels in [0, 1], above which colours are far off.

Real images lie within 0.06 of what the first layer of a network tells that was trained on them.
"""
WIDEST = 1.4
"""Ratio of the spreads above which contrast is too high, or below its inverse too low.

Real images have 0.8 to 1.1 of what the first layer tells.
"""
_CHUNK = 128


@dataclass(frozen=True)
class Pixels:
    """What stored images are made of, by channel, of pixels in [0, 1].

    Args:
        mean: by channel.
        std: by channel, over images and positions.
        clipped: share of the values that are 0 or 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
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
        by_image = torch.stack([values, values.square(), clipped]).mean((3, 4))
        sums.append(by_image.sum(1))
    mean, square, clipped = torch.stack(sums).sum(0) / len(chosen)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return Pixels(tuple(mean.tolist()), tuple(std.tolist()), tuple(clipped.tolist()))


def report_colours(images: Images, teacher: Teacher, log: RunLog) -> None:
    """Put the pixels of dreams beside what the first layer tells of training images.

    Args:
        images: dreamed.
        teacher: from which.
        log: given ``details["pixels"]``, two metrics, and a note on what is far off.
    """
    dreams, training = pixels_of(images), training_pixels(teacher)
    log.details["pixels"] = {
        "dreams": asdict(dreams),
        "training": None if training is None else asdict(training),
    }
    log.metrics["synthesis.clipped"] = sum(dreams.clipped) / len(dreams.clipped)
    if training is not None:
        log.metrics["synthesis.contrast"] = contrast(dreams, training)
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
            f"layer tells {_numbers(training.mean)} of training images: give bn_feature more weight"
        )
    ratio = contrast(dreams, training)
    if not 1 / WIDEST <= ratio <= WIDEST:
        clipped = 100 * sum(dreams.clipped) / len(dreams.clipped)
        found.append(
            f"contrast: the dreams' pixels spread {ratio:.1f} times as wide as the network's first "
            f"layer tells of training images, and {clipped:.0f} % of them are at 0 or 255: give "
            "bn_feature more weight, or more steps"
        )
    return found


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.2f}' for value in values)})"
