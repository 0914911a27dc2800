"""ColorShift: what a step sees of images, and what of its gradient comes back to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.synthesizers.colour_shift import draw_colours
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Regularizer

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Watcher(Regularizer):
    """Keeps the images it is shown and adds nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, step):
        self.seen.append(step.images.detach().clone())
        return step.images.sum() * 0


def dream(teacher, **changes):
    known = {
        "images": 4,
        "batch_size": 4,
        "regularizers": (),
        "stages": (Stage(2),),
        "parameterisation": Pixels(),
        "schedule": "constant",
        "jitter": 0,
        "clip": False,
        "engine": Engine(precision="float32", compile=False),
    }
    with DeepInversion(**(known | changes)).session(teacher, CPU) as session:
        return session.dream(BatchPlan(0, 0, 4, seed=5), lambda done, terms: None)


def test_contrast_and_brightness_are_drawn_anew_for_each_step_image_and_channel():
    colours = draw_colours((400, 5, 3), 0.5, generator(), CPU)
    values = torch.stack([colours.scale.log(), colours.offset])
    assert values.shape == (2, 400, 5, 3, 1, 1)
    assert values.abs().max() <= 0.5
    assert values.unique().numel() > 0.99 * values.numel()
    # Uniform in ±0.5: a deviation of 1/√12, over 12,000 values.
    assert values.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)
    assert values.mean().abs() < 0.01
    images = torch.randn(5, 3, 4, 6, generator=generator(1))
    shown = colours.shown(images, 7)
    expected = colours.scale[7, 2, 1] * images[2, 1] - colours.offset[7, 2, 1]
    assert torch.equal(shown[2, 1], expected)


def test_no_strength_leaves_images_and_the_generator_alone():
    drawn = generator()
    images = torch.randn(2, 3, 4, 4)
    assert draw_colours((3, 2, 3), 0.0, drawn, CPU).shown(images, 1) is images
    assert torch.equal(drawn.get_state(), generator().get_state())


def test_terms_see_shifted_images_and_the_gradient_goes_back_through_the_shift(toys, monkeypatch):
    # Adam's first step is lr·g/(|g| + eps), which loses g's size and keeps its sign: channels are
    # mirrored here, so that a gradient which forgot the scale would go the other way.
    from dreamkit.synthesizers import deepinversion

    def mirrored(*given):
        colours = draw_colours(*given)
        colours.scale[:, :, 1] *= -1
        drawn.append(colours)
        return colours

    drawn, watcher, model = [], Watcher(), toys.two_bn()
    monkeypatch.setattr(deepinversion, "draw_colours", mirrored)
    terms = (Term("watch", 1.0, watcher),)
    found = dream(toys.teacher(model), regularizers=terms, lr=0.25, colour_shift=0.5)
    colours, first = drawn[0], watcher.seen[0]
    start = (first + colours.offset[0]) / colours.scale[0]
    moved = (watcher.seen[1] + colours.offset[1]) / colours.scale[1]
    x = start.clone().requires_grad_()
    F.cross_entropy(model(colours.scale[0] * x - colours.offset[0]), found.labels).backward()
    sure = x.grad.abs() > 1e-5
    assert sure.float().mean() > 0.9
    step = (moved - start)[sure]
    torch.testing.assert_close(step, -0.25 * x.grad.sign()[sure], rtol=5e-3, atol=0)
