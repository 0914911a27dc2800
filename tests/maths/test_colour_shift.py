"""ColorShift: what a step sees of images, and what of its gradient comes back to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dreamkit.colour_shift import draw_colours, recoloured
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.regularizers.natural_spectrum import NaturalSpectrum
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


def options(**changes):
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
    return DeepInversion(**(known | changes))


def dream(teacher, **changes):
    with options(**changes).session(teacher, CPU) as session:
        return session.dream(BatchPlan(0, 0, 4, seed=5), lambda done, terms: None)


def test_contrast_and_brightness_are_drawn_anew_for_each_step_image_and_channel():
    colours = draw_colours((400, 5, 3), 0.5, generator(), CPU)
    assert colours.shape == (400, 2, 5, 3, 1, 1)
    values = torch.stack([colours[:, 0].log(), colours[:, 1]])
    assert values.abs().max() <= 0.5
    assert values.unique().numel() > 0.99 * values.numel()
    # Uniform in ±0.5: a deviation of 1/√12, over 12,000 values.
    assert values.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)
    assert values.mean().abs() < 0.01
    images = torch.randn(5, 3, 4, 6, generator=generator(1))
    shown = recoloured(images, colours[7])
    scale, offset = colours[7, :, 2, 1]
    assert torch.equal(shown[2, 1], scale * images[2, 1] - offset)


def test_without_strength_nothing_is_drawn():
    drawn = generator()
    assert draw_colours((3, 2, 3), 0.0, drawn, CPU) is None
    assert torch.equal(drawn.get_state(), generator().get_state())


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, with one channel mirrored: a gradient without σ would go the other way."""
    from dreamkit.synthesizers import deepinversion

    def mirrored(*given):
        colours = draw_colours(*given)
        colours[:, 0, :, 1] *= -1
        kept.append(colours)
        return colours

    kept = []
    monkeypatch.setattr(deepinversion, "draw_colours", mirrored)
    return kept


def test_networks_see_the_shift_and_terms_of_the_pixels_do_not(toys, drawn):
    # Adam's first step is lr·g/(|g| + eps), which loses g's size and keeps its sign.
    watcher, model = Watcher(), toys.two_bn()
    terms = (Term("watch", 1.0, watcher),)
    found = dream(toys.teacher(model), regularizers=terms, lr=0.25, colour_shift=0.5)
    start, moved = watcher.seen[:2]  # colours differ from step to step, these by a step alone
    x = start.clone().requires_grad_()
    F.cross_entropy(model(recoloured(x, drawn[0][0])), found.labels).backward()
    sure = x.grad.abs() > 1e-5
    assert sure.float().mean() > 0.9
    step = (moved - start)[sure]
    torch.testing.assert_close(step, -0.25 * x.grad.sign()[sure], rtol=5e-3, atol=0)


def test_a_competing_student_and_bn_statistics_see_the_shift(toys, drawn):
    teacher, student, seen = toys.two_bn(), toys.two_bn(), {}
    for name, model in {"teacher": teacher, "student": student}.items():

        def see(module, given, name=name):
            seen.setdefault(name, given[0].clone())

        model.register_forward_pre_hook(see)
    terms = (Term("bn_feature", 1.0, BNFeature()), Term("js_compete", 1.0, JSCompete()))
    synthesizer = options(regularizers=terms, colour_shift=0.5)
    with synthesizer.session(toys.teacher(teacher), CPU, student=student) as session:
        seen.clear()  # of what was looked at before
        session.dream(BatchPlan(0, 0, 4, seed=5), lambda done, terms: None)
    torch.testing.assert_close(seen["teacher"], seen["student"])
    start = (seen["teacher"] + drawn[0][0, 1]) / drawn[0][0, 0]
    # Pixels start from N(0, 1), whatever the colours are.
    assert start.mean().abs() < 0.1
    assert start.std().item() == pytest.approx(1, abs=0.1)


def test_what_is_compiled_takes_other_colours_each_step(toys):
    synthesizer = options(
        regularizers=(Term("natural_spectrum", 1.0, NaturalSpectrum()),),
        stages=(Stage(3),),
        colour_shift=0.5,
    )
    results = []
    for compiled in (False, True):
        with synthesizer.session(toys.teacher(toys.two_bn()), CPU) as session:
            if compiled:
                assert session.compile() is None
            found = session.dream(BatchPlan(0, 0, 4, seed=5), lambda done, terms: None)
            results.append(found.images)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
