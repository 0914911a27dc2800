"""Varying the images of a training step: colours, crops, mirrors, mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.colour_shift import draw_colours, recoloured
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.model_state import eval_mode
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.seeds import derived_seed
from dreamkit.training.augmentation import (
    drawn_share,
    random_crop,
    random_flip,
    random_paste,
    random_window,
)
from dreamkit.wording import one_line


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied, each step anew.

    Args:
        size: train on windows of this many pixels a side, cut out of each image where chance will;
            smaller ones take less time, of networks that take them. Null is the whole image.
        crop: largest shift in pixels; the border is filled with zeros after normalisation.
        flip: mirror half of the images left to right.
        mixup: α of the Beta(α, α) distribution by which images are mixed in pairs (Zhang et al.
            2018); 0 does not mix.
        cutmix: share of the images that have a rectangle of another one pasted in (after Yun et
            al. 2019).
        colour_shift: how far contrast and brightness of each image's channels are changed, by
            ``draw_colours``.
    """

    size: Annotated[int, Field(ge=8)] | None = None
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0, le=1)] = 0.0
    colour_shift: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.mixup and self.cutmix:
            raise OptionError("cutmix", "images are mixed by mixup already: set one of them to 0")


@dataclass(frozen=True)
class Mixed:
    """Images, and the two labels of each with their own's share.

    Args:
        images: (N, C, H, W), normalised.
        labels: (N,), those of the images themselves.
        others: (N,), those of what is mixed in.
        share: (N,), of the images themselves, in [0, 1].
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    share: Tensor


class Augmenter:
    """Varies batches; what it draws follows from the seed, the step and the rank alone.

    Args:
        options: how.
        seed: of what is drawn.
    """

    def __init__(self, options: Augmentation, seed: int) -> None:
        self.options = options
        self.seed = seed
        self.generator = torch.Generator()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Draw what a step (from 0) of this rank draws, whatever was drawn before."""
        purpose = f"augmentation of step {step} on rank {distributed.rank()}"
        self.generator.manual_seed(derived_seed(self.seed, purpose))

    def __call__(self, images: Tensor, labels: Tensor) -> Mixed:
        """Return images (N, C, H, W), normalised, varied, with what their labels (N,) become."""
        options, shape = self.options, (1, *images.shape[:2])
        colours = draw_colours(shape, options.colour_shift, self.generator, images.device)
        if colours is not None:
            images = recoloured(images, colours[0])
        if options.crop:
            images = random_crop(images, options.crop, self.generator, "zeros")
        if options.size is not None:
            images = random_window(images, options.size, self.generator)
        if options.flip:
            images = random_flip(images, self.generator)
        whole = torch.ones(len(images), device=images.device)
        if options.cutmix:
            images, others, own = random_paste(images, options.cutmix, self.generator)
            return Mixed(images, labels, labels[others], own)
        if options.mixup == 0:
            return Mixed(images, labels, labels, whole)
        share = drawn_share(options.mixup, self.generator)
        order = torch.randperm(len(images), generator=self.generator).to(images.device)
        images = share * images + (1 - share) * images[order]
        return Mixed(images, labels, labels[order], share * whole)


def check_window(
    options: Augmentation, model: nn.Module, role: str, card: Card, device: torch.device
) -> None:
    """Refuse windows of the images that a network does not take.

    Raises:
        DreamkitError: it does not, or they are larger than the images.
    """
    size, place = options.size, ("augmentation", "size")
    channels, height, width = card.input_size
    if size is None:
        return
    if size > min(height, width):
        raise DreamkitError(
            f"windows of {size} pixels do not fit images of {height} by {width}: set it to null",
            place,
        )
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(2, channels, size, size, device=device))
    except Exception as error:  # the model is anyone's code
        if is_out_of_memory(error):
            raise
        raise DreamkitError(
            f"the {role} does not take windows of {size} pixels: set it to null "
            f"({one_line(error)})",
            place,
        ) from error
