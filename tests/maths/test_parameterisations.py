"""Parameterisations: images and back, and what the optimizer's steps mean."""

from __future__ import annotations

import math

import pytest
import torch

from dreamkit.parameterisations.fourier import Fourier
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("entry", [Pixels(), Fourier(), Fourier(decay=0, colour=(2.0, 0.1))])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 5, 7), (1, 1, 6, 9), (2, 4, 4, 3)])
def test_rendering_undoes_encoding(entry, shape):
    x = images(*shape)
    parameters = entry.encode(x)
    back = entry.render(parameters, shape[2:])
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    assert parameters.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("entry", [Pixels(), Fourier()])
def test_a_start_has_the_shape_of_its_images_and_is_the_generators(entry):
    def start(seed):
        return entry.start((3, 3, 6, 7), torch.Generator().manual_seed(seed))

    assert entry.render(start(0), (6, 7)).shape == (3, 3, 6, 7)
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_amplitudes_fall_with_frequency_by_hand():
    # One coefficient of 1: a cosine of k periods across 16 pixels. The orthonormal inverse makes
    # it 2/16 high (its mirror image counts too), and it is scaled by 16/k^1.5.
    entry = Fourier(decay=1.5, luminance=1.0)
    for periods in (1, 2, 4):
        parameters = torch.zeros(1, 1, 16, 9, 2)
        parameters[0, 0, 0, periods, 0] = 1
        wave = torch.cos(2 * math.pi * periods * torch.arange(16) / 16)
        expected = 2 / periods**1.5 * wave.expand(16, 16)
        torch.testing.assert_close(entry.render(parameters, (16, 16))[0, 0], expected)


def test_a_coefficient_means_the_same_at_every_size():
    entry = Fourier()
    small, large = torch.zeros(1, 3, 8, 5, 2), torch.zeros(1, 3, 32, 17, 2)
    small[0, 0, 1, 2, 1] = large[0, 0, 1, 2, 1] = 0.7
    low, high = entry.render(small, (8, 8)), entry.render(large, (32, 32))
    torch.testing.assert_close(high[:, :, ::4, ::4], low)


def test_axes_of_colour_by_hand():
    # The zero frequency of the first axis is grey; of the second red against blue.
    entry = Fourier(luminance=3.0, colour=(2.0, 1.0))
    parameters = torch.zeros(1, 3, 4, 3, 2)
    parameters[0, 0, 0, 0, 0] = 1
    grey = entry.render(parameters, (4, 4))[0, :, 0, 0]
    torch.testing.assert_close(grey, torch.full((3,), 3 / math.sqrt(3)))
    parameters = torch.zeros(1, 3, 4, 3, 2)
    parameters[0, 1, 0, 0, 0] = 1
    red_blue = entry.render(parameters, (4, 4))[0, :, 0, 0]
    torch.testing.assert_close(red_blue, torch.tensor([math.sqrt(2), 0, -math.sqrt(2)]))


def test_gradients_reach_the_coefficients():
    entry = Fourier()
    parameters = entry.encode(images(2, 3, 6, 6)).requires_grad_()
    entry.render(parameters, (6, 6)).square().sum().backward()
    assert torch.isfinite(parameters.grad).all()
    assert parameters.grad.abs().sum() > 0


def test_dreams_in_fourier_space(toys):
    losses = []
    given = DeepInversion(
        images=4,
        batch_size=4,
        regularizers=(Term("bn_feature", 1.0, BNFeature()),),
        stages=(Stage(20, size=4), Stage(40)),
        lr=0.1,
        clip=True,
        jitter=0,
        parameterisation=Fourier(),
        engine=Engine(precision="float32", compile=False),
    )
    with given.session(toys.teacher(toys.two_bn()), torch.device("cpu")) as session:
        found = session.dream(
            BatchPlan(0, 0, 4, 1), lambda d, terms: losses.append(terms["loss"].item())
        )
    assert found.images.shape == (4, 3, 8, 8)
    assert min(losses[20:]) < 0.7 * losses[0]
    low, high = toys.card().pixel_range(found.images)
    assert ((found.images >= low - 1e-3) & (found.images <= high + 1e-3)).all()


class ChannelsLast:
    """Pixels whose parameters lie in memory in another order than their gradients come."""

    def start(self, shape, generator):
        return torch.randn(shape, generator=generator).permute(0, 2, 3, 1).contiguous()

    def encode(self, images):
        return images.permute(0, 2, 3, 1).contiguous()

    def render(self, parameters, size):
        return parameters.permute(0, 3, 1, 2)


@pytest.mark.parametrize("clip", [False, True])
def test_how_parameters_lie_in_memory_changes_no_dream(toys, clip):
    def dream(entry):
        given = DeepInversion(
            images=4,
            batch_size=4,
            regularizers=(Term("bn_feature", 1.0, BNFeature()),),
            stages=(Stage(5, size=4), Stage(5)),
            lr=0.1,
            clip=clip,
            parameterisation=entry,
            engine=Engine(precision="float32", compile=False),
        )
        with given.session(toys.teacher(toys.two_bn()), torch.device("cpu")) as session:
            return session.dream(BatchPlan(0, 0, 4, 1), lambda *_: None).images

    torch.testing.assert_close(dream(ChannelsLast()), dream(Pixels()))
