"""The spectrum of photographs: what images made by its law have, and others do not."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dreamkit.regularizers.natural_spectrum import NaturalSpectrum
from dreamkit.types import InversionStep

COLOURS = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
"""Brightness, red-blue and green-magenta in rows."""


def term(images, **options):
    return NaturalSpectrum(**options)(SimpleNamespace(images=images))


def by_the_law(count, height, width, decay=1.4, offset=0.6, channels=3, seed=0):
    """Return noise filtered to (f + offset)^-decay, of variance 1 a channel on average."""
    noise = torch.randn(
        count, channels, height, width, generator=torch.Generator().manual_seed(seed)
    ).double()
    side = min(height, width)
    down = torch.fft.fftfreq(height, d=1 / side)
    across = torch.fft.fftfreq(width, d=1 / side)
    law = ((down[:, None] ** 2 + across**2).sqrt() + offset) ** -decay
    law = law / law.square().mean().sqrt()
    axes = torch.fft.ifft2(torch.fft.fft2(noise) * law).real
    if channels != 3:
        return axes.float()
    axes = axes * (3 * torch.tensor([0.9, 0.08, 0.02])).sqrt().view(1, 3, 1, 1)
    rows = COLOURS / COLOURS.norm(dim=1, keepdim=True)
    return torch.einsum("nahw,ac->nchw", axes.float(), rows)


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(3, 32, 32), (3, 24, 17), (3, 8, 40), (3, 8, 8), (1, 16, 16)]
)
def test_images_made_by_the_law_have_next_to_nothing(channels, height, width):
    images = by_the_law(2000, height, width, channels=channels)
    assert images.var().item() == pytest.approx(1, rel=0.05)
    # A sampled deviation is 1/√(2·2000) off, of the means alone; squared and averaged over bands.
    assert term(images).item() < 2e-3
    assert term(images.flip(3).transpose(2, 3)).item() < 2e-3
    shown = 0.5 * images - 0.1  # of another normalisation
    assert term(shown, mean=-0.1, deviation=0.5).item() < 2e-3
    assert term(shown).item() > 0.1
    other = by_the_law(2000, height, width, decay=0.7, offset=0.2, channels=channels)
    assert term(other).item() > 0.05
    assert term(other, decay=0.7, offset=0.2).item() < 2e-3


def test_contrast_colour_and_brightness_count_by_their_size():
    images = by_the_law(4000, 16, 16)
    assert term(torch.zeros(4, 3, 16, 16)).item() == pytest.approx(1, rel=5e-3)
    assert term(2 * images).item() == pytest.approx(1, rel=0.1)
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert term(grey).item() == pytest.approx(2 / 3, rel=0.05)  # two of three axes are missing
    # A mean brightness of one deviation of images' means: σ̂ is then √2 σ in one band of eight.
    down = torch.fft.fftfreq(16, d=1 / 16)
    law = ((down[:, None] ** 2 + down**2).sqrt() + 0.6) ** -2.8
    sigma = math.sqrt(2.7 * float(law[0, 0] / law.sum()))
    brighter = images + sigma / math.sqrt(3)
    assert term(brighter).item() == pytest.approx((1 + (math.sqrt(2) - 1) ** 2 / 8) / 3, rel=0.1)


def test_following_its_gradient_gives_noise_the_spectrum():
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([images], 0.1)
    before = term(images).item()
    for _ in range(150):
        optimizer.zero_grad()
        term(images).backward()
        optimizer.step()
    assert term(images).item() < 0.01 * before
    plain = torch.zeros(2, 3, 8, 8, requires_grad=True)
    term(plain).backward()
    assert plain.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 2, 2), (3, 2, 1, 5), (2, 4, 3, 3)])
def test_tiny_images_have_a_finite_value(shape):
    assert term(torch.randn(shape)).isfinite()


@pytest.mark.parametrize(("count", "most"), [(1, 0.5), (8, 0.06)])
def test_few_photographs_are_not_blamed_for_their_mean(count, most):
    # A mean of N images is σ²/N off 0, squared: 1 and 0.125 on top, were it not taken off.
    drawn = by_the_law(512, 16, 16).split(count)
    assert torch.stack([term(images) for images in drawn]).mean().item() < most


def test_it_compiles_to_one_graph_of_the_same_gradient():
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)

    def value(images):
        return NaturalSpectrum()(InversionStep(images, labels, torch.zeros(4, 2)))

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(images), [images])
    (expected,) = torch.autograd.grad(value(images), [images])
    torch.testing.assert_close(found, expected)
