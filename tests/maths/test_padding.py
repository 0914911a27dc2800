"""Zeros that a layer pads before a convolution: the convolution pads them itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dreamkit.model_state import frozen
from dreamkit.synthesizers.engine import borrowed
from dreamkit.synthesizers.padding import padding_joined

SIZE = (3, 9, 8)


class SamePadding(nn.Conv2d):
    """A convolution with its padding layer inside, as networks from TensorFlow have it."""

    def __init__(self, padding, own=0, **options):
        super().__init__(3, 3, 3, padding=own, groups=3, **options)
        self.static_padding = nn.ZeroPad2d(padding)

    def forward(self, x):
        return super().forward(self.static_padding(x))


class NoPadding(SamePadding):
    """It says a padding and does none of it."""

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Twice(nn.Module):
    """What the padding layer returns is used once more."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3))

    def forward(self, x):
        return self.layers(x).mean((2, 3)) + self.layers[0](x).mean((2, 3))


class Pads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.constant_pad_nd.default
        return func(*args, **(kwargs or {}))


def around(layer):
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def copies(model, images):
    """Return the logits, their gradient in the images, and how often features were padded."""
    leaf = images.clone().requires_grad_()
    with Pads() as pads:
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    return logits.detach(), gradient, pads.count


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        (lambda: SamePadding((1, 1, 1, 1)), True),
        (lambda: SamePadding((1, 1, 2, 2), stride=2), True),
        (lambda: nn.Sequential(nn.ZeroPad2d((2, 2, 0, 0)), nn.Conv2d(3, 4, 3)), True),
        (lambda: SamePadding((0, 1, 0, 1), stride=2), False),  # one side alone
        (lambda: SamePadding((1, 1, 1, 1), own=1), False),
        (lambda: SamePadding((1, 1, 1, 1), padding_mode="circular"), False),
        (lambda: NoPadding((1, 1, 1, 1)), False),
        (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ReLU(), nn.Conv2d(3, 4, 3)), False),
    ],
)
def test_a_convolution_pads_what_the_layer_before_it_did(layer, joined):
    torch.manual_seed(0)
    model, images = around(layer()), torch.randn(2, *SIZE)
    with frozen(model):
        before = copies(model, images)
        with padding_joined(model, SIZE):
            within = copies(model, images)
        after = copies(model, images)
    for found in (within, after):
        torch.testing.assert_close(found[:2], before[:2])
    assert before[2] == after[2] > 0
    assert within[2] == (0 if joined else before[2])


def test_features_that_are_used_again_stay_padded():
    model = Twice()
    with frozen(model), padding_joined(model, SIZE):
        assert model.layers[0](torch.ones(1, *SIZE)).shape[2:] == (11, 10)
        assert model.layers[1].padding == (0, 0)


def test_a_network_that_takes_no_noise_is_left_alone():
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(5, 3, 3))  # images have 3 channels
    with frozen(model), padding_joined(model, SIZE):
        assert model[1].padding == (0, 0)


def test_a_borrowed_network_pads_so_and_is_given_back():
    model = around(SamePadding((1, 1, 1, 1)))
    with borrowed(model, SIZE):
        assert model[0].padding == (1, 1)
    assert model[0].padding == (0, 0)
    assert model[0].static_padding(torch.ones(1, *SIZE)).shape[2:] == (11, 10)
