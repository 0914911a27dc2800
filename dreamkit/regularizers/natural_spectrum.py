"""The power spectrum of images against that of photographs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dreamkit.colour_axes import colour_axes
from dreamkit.types import InversionStep, Regularizer

_SCALES = (math.sqrt(3 * 0.9), math.sqrt(3 * 0.08), math.sqrt(3 * 0.02))
"""Deviations of photographs along colour axes, if channels have 1: by their shares of variance."""


@dataclass(frozen=True)
class NaturalSpectrum(Regularizer):
    """How far a batch is from the power spectrum of photographs, relative, in bands of frequency.

    Photographs of anything have one spectrum, in periods along the shorter side, at 32 pixels as at
    224: amplitudes fall as (f + offset)^-decay (after Field, "Relations between the statistics of
    natural images and the response properties of cortical cells", 1987), and nine tenths of the
    variance are brightness. With the deviation of all pixels that is a deviation σ for every band
    and colour axis. The term is the mean over bands and axes of (σ̂ - σ)² / σ², where σ̂ is the
    batch's root mean square, plus the mean over axes of μ̂² / σ² - 1/N, if that is more than 0: μ̂ is
    the mean of all pixels, which for N images is off by chance. Bands are half an octave wide; the
    first is the images' means, the second all below 1.4 periods. Images of other than three
    channels have one axis for each, of the same law, which is not that of digits.

    It is no published term. 1,000 test images of CIFAR-10 have 0.08 and 400 of ImageNet 0.07, by
    which decay and offset were chosen; images of one grey, of mean brightness, have 1, and noise of
    32 pixels 31.

    Args:
        decay: power by which amplitudes fall.
        offset: in periods: it flattens the lowest frequencies.
        mean: of photographs' pixels, as the teacher is shown them.
        deviation: of photographs' pixels, as the teacher is shown them.
    """

    decay: Annotated[float, Field(ge=0)] = 1.4
    offset: Annotated[float, Field(gt=0)] = 0.6
    mean: float = 0.0
    deviation: Annotated[float, Field(gt=0)] = 1.0

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape ()."""
        axes = (step.images.float() - self.mean) / self.deviation
        if axes.shape[1] == 3:
            axes = colour_axes(axes, _SCALES)  # of variance 1 each
        spectrum = torch.view_as_real(torch.fft.rfft2(axes, norm="forward"))
        power = spectrum.square().sum(4).mean(0)
        periods = _periods(axes)
        count, bands = _bands(periods, axes.shape[3])
        law = (periods + self.offset).pow(-2 * self.decay)
        law = law / (law.flatten() @ count)
        expected = law.flatten() @ bands
        filled = expected > 0  # tiny images have no frequency in some band
        share = torch.where(filled, power.flatten(1) @ bands, 1) / torch.where(filled, expected, 1)
        # The root has no gradient at 0.
        spread = ((share + 1e-6).sqrt() - 1).square() * filled
        mean = axes.mean((0, 2, 3)).square() / expected[0] - 1 / len(axes)
        return spread.sum() / filled.sum() / len(spread) + mean.mean().clamp(min=0)


def _periods(images: Tensor) -> Tensor:
    """Return each frequency's periods along the shorter side, (H, W // 2 + 1)."""
    height, width = images.shape[2:]
    down = torch.fft.fftfreq(height, device=images.device)
    across = torch.arange(width // 2 + 1, device=images.device) / width
    return torch.sqrt(down[:, None].square() + across.square()) * min(height, width)


def _bands(periods: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return how often each frequency counts (F,), and bands' shares of frequencies (F, bands).

    Args:
        periods: of each frequency, (H, W // 2 + 1).
        width: of the images.
    """
    twice = torch.full_like(periods, 2.0)
    # A column of the half spectrum stands for its mirror image as well, but for these.
    twice[:, 0] = 1.0
    if width % 2 == 0:
        twice[:, -1] = 1.0
    highest = max(min(len(periods), width) // 2, 1)
    top = int(2 * math.log2(highest)) + 1
    octaves = periods.clamp(min=1).log2()
    number = torch.where(periods > 0, (2 * octaves + 1e-3).floor() + 1, 0).long().clamp(max=top)
    inside = F.one_hot(number, top + 1).float() * twice.unsqueeze(2)
    inside = inside.flatten(0, 1)
    return twice.flatten(), inside / inside.sum(0).clamp(min=1)
