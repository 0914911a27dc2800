"""Fourier coefficients: low frequencies move as easily as they are strong in natural images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

_LUMINANCE = (1 / math.sqrt(3),) * 3
_RED_BLUE = (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2))
_GREEN_MAGENTA = (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6))


@dataclass(frozen=True)
class Fourier:
    """Fourier coefficients scaled by 1/f^decay, of decorrelated colours.

    After Olah, Mordvintsev and Schubert, "Feature Visualization", Distill 2017. The gradient of
    natural images' statistics is steepest along low frequencies and luminance; scaled this way,
    Adam's equal steps follow it. It reaches the same loss in a fraction of the steps.

    Args:
        decay: power p of the 1/f^p by which amplitudes fall with frequency f; 1 is the mean
            spectrum of natural images.
        deviation: standard deviation of the coefficients at the start.
        luminance: scale of the brightness axis; images of other than three channels are scaled by
            it as a whole.
        colour: scales of the red-blue and the green-magenta axes.
    """

    decay: Annotated[float, Field(ge=0)] = 1.5
    deviation: Annotated[float, Field(gt=0)] = 0.3
    luminance: Annotated[float, Field(gt=0)] = 1.4
    colour: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.7, 0.5)

    def start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Return coefficients (N, C, H, W // 2 + 1, 2) from N(0, deviation²)."""
        images, channels, height, width = shape
        half = (images, channels, height, width // 2 + 1, 2)
        return self.deviation * torch.randn(half, generator=generator)

    def encode(self, images: Tensor) -> Tensor:
        """Return the coefficients of images."""
        axes = torch.linalg.inv(self._axes(images))
        spectrum = torch.fft.rfft2(_turned(images.float(), axes), norm="ortho")
        return torch.view_as_real(spectrum / self._amplitudes(images, images.shape[2:]))

    def render(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images (N, C, H, W) of coefficients."""
        spectrum = torch.view_as_complex(parameters) * self._amplitudes(parameters, size)
        return _turned(torch.fft.irfft2(spectrum, s=size, norm="ortho"), self._axes(parameters))

    def _amplitudes(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the amplitude of each frequency (H, W // 2 + 1), 1 at one period an image.

        Times √(H·W), so that a coefficient means the same at every resolution.
        """
        height, width = size
        down = torch.fft.fftfreq(height, d=1 / height, device=like.device)
        across = torch.fft.rfftfreq(width, d=1 / width, device=like.device)
        periods = torch.sqrt(down[:, None].square() + across.square()).clamp(min=1)
        return math.sqrt(height * width) * periods.pow(-self.decay)

    def _axes(self, like: Tensor) -> Tensor:
        """Return the matrix from decorrelated axes to channels (C, C)."""
        channels = like.shape[1]
        if channels != 3:
            return self.luminance * torch.eye(channels, device=like.device)
        directions = torch.tensor([_LUMINANCE, _RED_BLUE, _GREEN_MAGENTA], device=like.device)
        return directions.t() * torch.tensor([self.luminance, *self.colour], device=like.device)


def _turned(images: Tensor, axes: Tensor) -> Tensor:
    return torch.einsum("ij,njhw->nihw", axes, images)
