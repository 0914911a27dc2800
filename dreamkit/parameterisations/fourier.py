"""Fourier coefficients: low frequencies move as easily as they are strong in natural images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.colour_axes import colour_axes
from dreamkit.types import Parameterisation


@dataclass(frozen=True)
class Fourier(Parameterisation):
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
        colour: scales of the red-blue and the green-magenta axes. They are far weaker than
            brightness in photographs: 0.31 and 0.17 of it in ImageNet's, by what the first layer
            of an EfficientNet-Lite0 stores.
    """

    decay: Annotated[float, Field(ge=0)] = 1.5
    deviation: Annotated[float, Field(gt=0)] = 0.3
    luminance: Annotated[float, Field(gt=0)] = 1.4
    colour: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.35, 0.2)

    def start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Return coefficients (N, C, H, W // 2 + 1, 2) from N(0, deviation²)."""
        images, channels, height, width = shape
        half = (images, channels, height, width // 2 + 1, 2)
        return self.deviation * torch.randn(half, generator=generator)

    def encode(self, images: Tensor) -> Tensor:
        """Return the coefficients of images."""
        spectrum = torch.fft.rfft2(self._axes(images.float()), norm="ortho")
        return torch.view_as_real(spectrum / self._amplitudes(images, images.shape[2:]))

    def render(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images (N, C, H, W) of coefficients."""
        spectrum = torch.view_as_complex(parameters) * self._amplitudes(parameters, size)
        return self._channels(torch.fft.irfft2(spectrum, s=size, norm="ortho"))

    def _amplitudes(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the amplitude of each frequency (H, W // 2 + 1), 1 at one period an image.

        Times √(H·W), so that a coefficient means the same at every resolution.
        """
        height, width = size
        down = torch.fft.fftfreq(height, d=1 / height, device=like.device)
        across = torch.fft.rfftfreq(width, d=1 / width, device=like.device)
        periods = torch.sqrt(down[:, None].square() + across.square()).clamp(min=1)
        return math.sqrt(height * width) * periods.pow(-self.decay)

    def _channels(self, axes: Tensor) -> Tensor:
        """Turn brightness, red-blue and green-magenta, each to its scale, into red, green, blue.

        Written out with numbers: a matrix would be copied to the device at every step.
        """
        if axes.shape[1] != 3:
            return self.luminance * axes
        brightness, red_blue, magenta = axes.unbind(1)
        grey = brightness * (self.luminance / math.sqrt(3))
        x = red_blue * (self.colour[0] / math.sqrt(2))
        y = magenta * (self.colour[1] / math.sqrt(6))
        return torch.stack([grey + x + y, grey - 2 * y, grey - x + y], dim=1)

    def _axes(self, channels: Tensor) -> Tensor:
        """Undo ``_channels``: its axes are orthonormal but for their scales."""
        if channels.shape[1] != 3:
            return channels / self.luminance
        return colour_axes(channels, (self.luminance, *self.colour))
