"""Images from a generator that somebody else trained, such as a GAN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, MissingPath, OptionError
from dreamkit.types import NO_LABEL, Images, ImageSource, StoredImages
from dreamkit.wording import first_line, one_line


@dataclass(frozen=True)
class GeneratorImages(ImageSource):
    """Images that a generator draws: proxy data where real ones are missing.

    The generator is a program and is run: use files that you trust.

    Args:
        path: a TorchScript file (.pt, .ts, .pth) or a ``torch.export`` program (.pt2) that maps
            noise (N, *latent) to images (N, C, H, W).
        images: how many to draw.
        latent: shape of one image's noise, e.g. [100] or [100, 1, 1].
        pixels: values that black and white have in its output.
        batch_size: images drawn at once.
        seed: of the noise, which is N(0, 1).
    """

    path: str
    images: Annotated[int, Field(ge=1)]
    latent: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    pixels: tuple[float, float] = (-1.0, 1.0)
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise MissingPath("path", f"no such file: {self.path}")
        if not self.pixels[0] < self.pixels[1]:
            raise OptionError("pixels", "write [black, white] with black less than white")

    def open(self, card: Card) -> Images:
        """Return the images at the card's input size, without labels.

        Raises:
            DreamkitError: the file cannot be run, or makes images of other channels.
        """
        generator = self._load()
        noise = torch.Generator().manual_seed(self.seed)
        parts = []
        for first in range(0, self.images, self.batch_size):
            size = min(self.batch_size, self.images - first)
            # Always a full batch: a program may have been exported for one size.
            drawn = torch.randn(self.batch_size, *self.latent, generator=noise)
            parts.append(self._draw(generator, drawn, card)[:size])
        return StoredImages(torch.cat(parts), torch.full((self.images,), NO_LABEL))

    def _load(self) -> Any:
        try:
            if Path(self.path).suffix == ".pt2":
                return torch.export.load(self.path).module()
            return torch.jit.load(self.path, map_location="cpu").eval()
        except Exception as error:  # a file that is none fails in many ways
            reason = first_line(error)
            raise DreamkitError(
                f"{self.path} is neither a TorchScript file nor (.pt2) a torch.export program: "
                f"{reason}",
                ("path",),
            ) from error

    @torch.no_grad()
    def _draw(self, generator: Any, noise: Tensor, card: Card) -> Tensor:
        """Return stored images (N, C, H, W) at the card's size."""
        try:
            made = generator(noise)
        except Exception as error:  # it is anyone's program
            reason = one_line(error)
            raise DreamkitError(
                f"the generator does not take noise of shape {tuple(noise.shape)}: {reason}",
                ("latent",),
            ) from error
        channels, *size = card.input_size
        shape = tuple(getattr(made, "shape", ()))
        if len(shape) != 4 or shape[:2] != (len(noise), channels):
            raise DreamkitError(
                f"the generator returns {shape or type(made).__name__} for {len(noise)} images; "
                f"{card.name} takes {channels} channels, so it should be "
                f"({len(noise)}, {channels}, height, width)",
                ("path",),
            )
        black, white = self.pixels
        pixels = ((made.float() - black) / (white - black)).clamp(0, 1)
        if not math.isfinite(float(pixels.sum())):
            raise DreamkitError("the generator's images are not finite", ("path",))
        if list(shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        stored: Tensor = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        return stored
