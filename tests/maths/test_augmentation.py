"""Random crops and mirror images: each image's own, from the generator alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dreamkit.training.augmentation import random_crop, random_flip, random_window


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count, channels=2, height=5, width=4, dtype=torch.float32):
    """Return images of which no two pixels are alike, and none is zero."""
    total = count * channels * height * width
    return torch.arange(1, total + 1).view(count, channels, height, width).to(dtype)


@pytest.mark.parametrize("border", ["reflect", "zeros"])
def test_each_crop_is_one_of_the_windows_of_the_padded_image(border):
    images = numbered(400)
    crops = random_crop(images, 2, generator(), border)
    assert crops.shape == images.shape
    padded = F.pad(images, (2,) * 4, mode="reflect" if border == "reflect" else "constant")
    windows = torch.stack(
        [padded[:, :, r : r + 5, c : c + 4] for r in range(5) for c in range(5)], dim=1
    )
    matches = (windows == crops[:, None]).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    # 400 draws of 25 shifts: each is seen 16 times on the average, with a deviation of 4.
    counts = matches.sum(0)
    assert counts.min() >= 3
    assert counts.max() <= 32
    chosen = matches.float().argmax(1)
    assert torch.corrcoef(torch.stack([chosen // 5, chosen % 5]).float())[0, 1].abs() < 0.15


def test_a_crop_by_hand():
    # Of the nine windows of a 2×2 image padded by one, the first begins at the corner.
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    images = image.expand(200, 1, 2, 2)
    seen = {
        border: {tuple(crop.flatten().tolist()) for crop in random_crop(images, 1, draws, border)}
        for border, draws in (("reflect", generator()), ("zeros", generator()))
    }
    # Padded by reflection: rows 4 3 4 3, 2 1 2 1, 4 3 4 3, 2 1 2 1.
    assert seen["reflect"] == {(4, 3, 2, 1), (3, 4, 1, 2), (2, 1, 4, 3), (1, 2, 3, 4)}
    assert (0, 0, 0, 1) in seen["zeros"]
    assert (4, 0, 0, 0) in seen["zeros"]
    assert len(seen["zeros"]) == 9


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_types_are_kept_and_no_padding_changes_nothing(dtype):
    images = numbered(2, dtype=dtype)
    assert torch.equal(random_crop(images, 0, generator()), images)
    for border in ("reflect", "zeros"):
        assert random_crop(images, 1, generator(), border).dtype == dtype
    assert random_flip(images, generator()).dtype == dtype


def test_flips_are_each_images_own_and_half_of_all():
    images = numbered(400)
    flipped = random_flip(images, generator())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250  # five deviations
    halves = mirrored[:200], mirrored[200:]
    assert not torch.equal(*halves)


@pytest.mark.parametrize("view", [lambda x, g: random_crop(x, 2, g), random_flip])
def test_views_are_functions_of_the_generator_alone(view):
    images = numbered(50)
    before, kept = torch.get_rng_state(), images.clone()
    first = view(images, generator(1))
    assert torch.equal(view(images, generator(1)), first)
    assert not torch.equal(view(images, generator(2)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, kept)
    draws = generator(1)
    assert not torch.equal(view(images, draws), view(images, draws)), "draws go on"


def test_gradients_flow_to_the_pixels_that_are_seen():
    images = numbered(8).requires_grad_()
    crops = random_flip(random_crop(images, 1, generator(), "zeros"), generator())
    (gradient,) = torch.autograd.grad(crops.square().sum(), [images])
    seen = torch.isin(images.detach(), crops.detach())
    assert not seen.all()
    assert torch.equal(gradient, torch.where(seen, 2 * images.detach(), 0))


@pytest.mark.parametrize(("padding", "border"), [(-1, "zeros"), (4, "reflect")])
def test_padding_that_does_not_fit(padding, border):
    with pytest.raises(ValueError, match=f"padding {padding} does not fit images of 5 by 4"):
        random_crop(numbered(1), padding, generator(), border)


def test_crops_come_as_channels_last():
    crops = random_crop(numbered(3), 1, generator())
    assert crops.is_contiguous(memory_format=torch.channels_last)
    assert random_flip(crops, generator()).is_contiguous(memory_format=torch.channels_last)


def test_each_window_is_one_of_the_images_own():
    images = numbered(300)
    found = random_window(images, 3, generator())
    windows = torch.stack(
        [images[:, :, r : r + 3, c : c + 3] for r in range(3) for c in range(2)], dim=1
    )
    matches = (windows == found[:, None]).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    # 300 draws of six places: 50 of each on the average, with a deviation of 6.5.
    assert matches.sum(0).min() >= 25
    assert matches.sum(0).max() <= 80


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="no window of 5"):
        random_window(numbered(2), 5, generator())
