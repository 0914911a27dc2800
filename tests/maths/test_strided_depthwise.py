"""Strided depthwise convolutions in bfloat16: their gradient is that of stride 1, spread out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.strided_depthwise import StridedDepthwise

CPU = torch.device("cpu")
NO_VIEW = torch.zeros(3, dtype=torch.int64)


def gradient(size, kernel, stride, padding, dilation, within=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *size, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4, 1, *kernel, generator=generator).bfloat16()
    y = F.conv2d(x, weight, None, stride, padding, dilation, 4)
    outer = torch.randn(y.shape, generator=generator).bfloat16()
    if within is None:
        return torch.autograd.grad(y, x, outer)[0]
    with within():
        return torch.autograd.grad(y, x, outer)[0]


@pytest.mark.parametrize(
    "case",
    [
        ((8, 8), (3, 3), 2, 1, 1),
        ((9, 8), (3, 3), 2, 1, 1),  # the last row is seen by no output
        ((7, 9), (5, 3), (2, 3), (2, 0), 1),
        ((11, 10), (3, 3), 2, 2, 2),
        ((8, 8), (3, 3), 1, 1, 1),
    ],
)
def test_the_gradient_is_torchs(case):
    within = StridedDepthwise()
    found = gradient(*case, within=within)
    torch.testing.assert_close(found, gradient(*case), rtol=2e-2, atol=2e-2)
    assert within.wanted == (case[2] != 1)


def test_it_looks_no_longer_where_there_are_none():
    within = StridedDepthwise()
    case = ((8, 8), (3, 3), 1, 1, 1)
    gradient(*case, within=within)
    gradient((8, 8), (3, 3), 2, 1, 1, within=within)
    assert not within.wanted


@pytest.mark.parametrize(("precision", "wanted"), [("bfloat16", True), ("float32", False)])
def test_an_evaluator_in_bfloat16_takes_them_so(precision, wanted):
    conv = nn.Conv2d(3, 3, 3, 2, 1, groups=3, bias=False).requires_grad_(False)

    def objective(images, labels, arithmetic, shown=None):
        with arithmetic:
            return {"square": conv(images).float().square().sum()}

    evaluator = Evaluator(objective, CPU, precision)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = evaluator(images, torch.zeros(2), NO_VIEW).gradient
    assert evaluator._strided.wanted is wanted
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(conv(leaf).square().sum(), leaf)
    assert (found - expected).norm() < 2e-2 * expected.norm()
