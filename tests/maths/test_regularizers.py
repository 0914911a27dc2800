"""Regularizers against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dreamkit.errors import DreamkitError
from dreamkit.regularizers.activation import Activation
from dreamkit.regularizers.adversarial import Adversarial
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.information_entropy import InformationEntropy
from dreamkit.regularizers.js_compete import JSCompete, jensen_shannon
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.one_hot import OneHot
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.types import InversionStep, LayerStatistics

# 1 2 4
# 0 3 1
# 5 2 7
IMAGE = torch.tensor([[1.0, 2, 4], [0, 3, 1], [5, 2, 7]]).view(1, 1, 3, 3)


def step_of(images=IMAGE, teacher=None, student=None, statistics=()):
    labels = torch.zeros(len(images), dtype=torch.int64)
    logits = torch.zeros(len(images), 2) if teacher is None else teacher
    return InversionStep(images, labels, logits, student, statistics)


def test_tv_l2_by_hand():
    # horizontal  1 2 | 3 -2 | -3 5         squares 1+4+9+4+9+25  = 52
    # vertical   -1 1 -3 | 5 -1 6           squares 1+1+9+25+1+36 = 73
    # diagonal \  2 -1 | 2 4                squares 4+1+4+16      = 25
    # diagonal / -2 -1 | 2 1                squares 4+1+4+1       = 10
    expected = math.sqrt(52) + math.sqrt(73) + 5 + math.sqrt(10)
    assert TotalVariation()(step_of()).item() == pytest.approx(expected, rel=1e-6)


def test_tv_l2_takes_each_norm_over_the_whole_batch():
    # Two equal images: each sum of squares doubles, so each norm grows by √2 (not by 2).
    batch = IMAGE.repeat(2, 1, 1, 1)
    one, two = TotalVariation()(step_of()), TotalVariation()(step_of(batch))
    assert two.item() == pytest.approx(math.sqrt(2) * one.item(), rel=1e-6)


def test_tv_l1_by_hand():
    # Mean absolute differences: 16/6 + 17/6 + 9/4 + 6/4 = 9.25, whatever the batch size.
    expected = 16 / 6 + 17 / 6 + 9 / 4 + 6 / 4
    assert TotalVariation("l1")(step_of()).item() == pytest.approx(expected, rel=1e-6)
    batch = IMAGE.repeat(3, 1, 1, 1)
    assert TotalVariation("l1")(step_of(batch)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_tv_of_a_flat_image_is_zero_with_a_finite_gradient(norm):
    flat = torch.full((2, 3, 4, 4), 0.7, requires_grad=True)
    value = TotalVariation(norm)(step_of(flat))
    value.backward()
    assert value.item() == 0
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_l2_by_hand():
    # 1+4+16 + 0+9+1 + 25+4+49 = 109
    value = L2Norm()(step_of())
    assert value.shape == ()
    assert value.item() == pytest.approx(math.sqrt(109))


def two_layers():
    t = torch.tensor
    return (
        # ‖(1,2)-(4,6)‖ = ‖(3,4)‖ = 5;  ‖(1,1)-(1,3)‖ = 2;  together 7
        LayerStatistics("first", t([1.0, 2]), t([1.0, 1]), t([4.0, 6]), t([1.0, 3])),
        # |0-1| = 1;  |5-2| = 3;  together 4
        LayerStatistics("second", t([0.0]), t([5.0]), t([1.0]), t([2.0])),
    )


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, 7 + 4), (10.0, 10 * 7 + 4), (0.0, 4), (2.5, 2.5 * 7 + 4)],
)
def test_bn_feature_by_hand(scale, expected):
    term = BNFeature("paper", first_layer_scale=scale)
    assert term(step_of(statistics=two_layers())).item() == pytest.approx(expected)


def test_bn_feature_per_layer_is_unscaled():
    parts = BNFeature("paper", first_layer_scale=10).per_layer(step_of(statistics=two_layers()))
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({"first": 7, "second": 4})


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_relative_bn_feature_joins_layers_of_all_widths(scale):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(4, width, generator=generator) + 0.5 for width in (3, 1, 7)]
    layers = [
        LayerStatistics(str(i), mean.requires_grad_(), var.requires_grad_(), stored, spread)
        for i, (mean, var, stored, spread) in enumerate(drawn)
    ]
    moved = [tensor for layer in layers for tensor in (layer.mean, layer.var)]
    found = BNFeature(first_layer_scale=scale)(step_of(statistics=tuple(layers)))
    parts = [
        (((s.mean - s.running_mean) ** 2 + (s.var**0.5 - s.running_var**0.5) ** 2) / s.running_var)
        for s in layers
    ]
    expected = (scale * parts[0].mean() + parts[1].mean() + parts[2].mean()) / 3
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, moved), torch.autograd.grad(expected, moved), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_bn_feature_gradient_is_finite_where_the_statistics_already_match():
    mean = torch.tensor([1.0, 2], requires_grad=True)
    var = torch.tensor([3.0, 4], requires_grad=True)
    same = LayerStatistics("x", mean, var, mean.detach().clone(), var.detach().clone())
    value = BNFeature()(step_of(statistics=(same,)))
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(var.grad).all()


def test_relative_bn_feature_does_not_blow_up_at_dead_channels():
    # Variances 0 and 2: the first is divided by a thousandth of their mean. Off by 0.01 and,
    # where nothing varies in training either, by no spread: (0.0001/0.001 + 0 + 0 + 0)/2.
    mean = torch.tensor([0.01, 0.0], requires_grad=True)
    var = torch.tensor([0.0, 2.0], requires_grad=True)
    dead = LayerStatistics("x", mean, var, torch.zeros(2), torch.tensor([0.0, 2.0]))
    value = BNFeature("relative")(step_of(statistics=(dead,)))
    assert value.item() == pytest.approx(0.05, rel=1e-3)
    value.backward()
    assert mean.grad.tolist() == pytest.approx([0.01 / 0.001, 0])
    assert torch.isfinite(var.grad).all()


def test_relative_bn_feature_of_a_layer_that_stores_no_variance_is_finite():
    mean, var = (torch.full((3,), 0.5, requires_grad=True) for _ in range(2))
    blank = LayerStatistics("x", mean, var, torch.zeros(3), torch.zeros(3))
    value = BNFeature("relative")(step_of(statistics=(blank,)))
    value.backward()
    for tensor in (value, mean.grad, var.grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("form", ["paper", "relative"])
def test_one_image_without_positions_has_a_gradient(form):
    # One image at 1x1 positions: its mean is itself, its variance 0 in every channel.
    from dreamkit.synthesizers.bn_statistics import tapped

    bn = torch.nn.BatchNorm2d(4).eval()
    pixels = torch.tensor([-1.0, 2, 2, 4]).view(1, 4, 1, 1).requires_grad_()
    with tapped(bn) as tap:
        logits, statistics = tap(pixels)
    assert statistics[0].var.abs().max() < 1e-6
    BNFeature(form)(step_of(pixels, logits.flatten(1), statistics=statistics)).backward()
    # Of a mean that is x itself: x/‖x‖, and 2x over four channels of variance 1.
    expected = pixels.detach() / (5 if form == "paper" else 2)
    torch.testing.assert_close(pixels.grad, expected, rtol=1e-4, atol=1e-4)


def test_js_of_identical_predictions_is_zero_so_the_term_is_one():
    logits = torch.tensor([[3.0, -1, 0.5], [0.0, 0, 0]])
    value = JSCompete()(step_of(teacher=logits, student=logits.clone()))
    assert value.item() == pytest.approx(1, abs=1e-7)


def test_js_of_opposite_certain_predictions_is_ln_2():
    # p = (1,0), q = (0,1), m = (½,½): KL(p‖m) = KL(q‖m) = ln 2, JS = ln 2.
    teacher, student = torch.tensor([[200.0, 0]]), torch.tensor([[0.0, 200]])
    value = JSCompete()(step_of(teacher=teacher, student=student))
    assert value.item() == pytest.approx(1 - math.log(2), abs=1e-6)


def test_js_by_hand_averaged_over_the_batch():
    # First image: p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8):
    # KL(p‖m) = 3/4 ln 6/5 + 1/4 ln 2/3, KL(q‖m) = 1/2 ln 4/5 + 1/2 ln 4/3.
    # Second image: p = q, JS 0. Mean: half.
    teacher = torch.tensor([[math.log(3), 0], [1.0, 2]])
    student = torch.tensor([[0.0, 0], [1.0, 2]])
    kl_p = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    kl_q = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    js = (kl_p + kl_q) / 2
    assert jensen_shannon(teacher, student).item() == pytest.approx(js / 2, rel=1e-5)
    value = JSCompete()(step_of(teacher=teacher, student=student))
    assert value.item() == pytest.approx(1 - js / 2, rel=1e-6)


def test_js_reference_form_by_hand():
    # At temperature 3 the teacher's (3 ln 4, 0) is P = (0.8, 0.2) and the student's (0, 0) is
    # Q = (0.5, 0.5); M = (0.65, 0.35); nothing is clamped.
    teacher, student = torch.tensor([[3 * math.log(4), 0]]), torch.zeros(1, 2)
    kl_p = 0.65 * math.log(0.65 / 0.8) + 0.35 * math.log(0.35 / 0.2)
    kl_q = 0.65 * math.log(0.65 / 0.5) + 0.35 * math.log(0.35 / 0.5)
    value = JSCompete("reference")(step_of(teacher=teacher, student=student))
    assert value.item() == pytest.approx(1 - 0.5 * (kl_p + kl_q), rel=1e-6)


def test_js_reference_form_clamps_probabilities():
    # P = (1, 0) clamped to (0.99, 0.01), Q = (½, ½), M = (¾, ¼).
    teacher, student = torch.tensor([[900.0, 0]]), torch.zeros(1, 2)
    kl_p = 0.75 * math.log(0.75 / 0.99) + 0.25 * math.log(0.25 / 0.01)
    kl_q = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    value = JSCompete("reference")(step_of(teacher=teacher, student=student))
    assert 0.5 * (kl_p + kl_q) < 1  # the outer clamp is not what this shows
    assert value.item() == pytest.approx(1 - 0.5 * (kl_p + kl_q), rel=1e-5)


def test_js_reference_form_clamps_the_divergence():
    # P = (.99,.01), Q = (.01,.99), M = (½,½): each KL is ½ ln(.5/.99) + ½ ln(.5/.01) = 1.61 > 1,
    # so the term is exactly 0.
    teacher, student = torch.tensor([[900.0, 0]]), torch.tensor([[0.0, 900]])
    value = JSCompete("reference")(step_of(teacher=teacher, student=student))
    assert value.item() == 0


def test_js_reference_form_loses_its_gradient_with_many_classes_and_the_papers_does_not():
    # 400 nearly even classes: every probability is near 1/400 < 0.01 and is clamped.
    student = torch.zeros(1, 400)
    gradients = {}
    for form in ("reference", "paper"):
        teacher = torch.linspace(-1, 1, 400).view(1, -1).requires_grad_()
        JSCompete(form)(step_of(teacher=teacher, student=student)).backward()
        gradients[form] = teacher.grad.abs().max().item()
    assert gradients["reference"] == 0
    assert gradients["paper"] > 1e-6


@pytest.mark.parametrize(
    "term",
    [
        TotalVariation(),
        TotalVariation("l1"),
        L2Norm(),
        BNFeature(),
        JSCompete(),
        JSCompete("reference"),
    ],
    ids=repr,
)
def test_gradients_flow_to_the_images(term, toys):
    from dreamkit.synthesizers.bn_statistics import tapped

    teacher, student = toys.two_bn(), toys.residual()
    pixels = toys.card().normalise(toys.images(4).images).requires_grad_()
    with tapped(teacher) as tap:
        logits, statistics = tap(pixels)
    value = term(step_of(pixels, logits, student(pixels), statistics))
    assert value.shape == ()
    value.backward()
    assert torch.isfinite(pixels.grad).all()
    per_image = pixels.grad.flatten(1).abs().sum(1)
    assert (per_image > 0).all(), "every image of the batch gets a gradient"


# --- terms of the generator methods -----------------------------------------------------------


def test_adversarial_by_hand():
    # Teacher (¾, ¼) twice. The first student, (3/5, 2/5), agrees on the class; the second does not.
    teacher = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    student = torch.tensor([[math.log(1.5), 0.0], [0.0, 1.0]])
    kl = 0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.4)
    step = step_of(torch.zeros(2, 1, 1, 1), teacher, student)
    assert Adversarial()(step).item() == pytest.approx(-kl / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("term", "need"),
    [
        (JSCompete(), "student_logits"),
        (Adversarial(), "student_logits"),
        (Activation(), "features"),
        (BNFeature(), "bn_statistics"),
    ],
)
def test_a_step_without_what_a_term_needs_is_named(term, need):
    with pytest.raises(DreamkitError, match=rf"{type(term).__name__} needs '{need}'"):
        term(step_of())


def test_information_entropy_by_hand():
    # One image of each class for certain: the mean is even, and its entropy log10 2.
    even = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    images = torch.zeros(2, 1, 1, 1)
    assert InformationEntropy()(step_of(images, even)).item() == pytest.approx(-math.log10(2))
    # Ten classes equally often, the authors' best value, and 1/10 and 9/10 of two.
    ten = torch.zeros(1, 10)
    assert InformationEntropy()(step_of(images[:1], ten)).item() == pytest.approx(-1)
    uneven = torch.tensor([[math.log(9), 0.0]])
    expected = 0.1 * -1 + 0.9 * math.log10(0.9)
    assert InformationEntropy()(step_of(images[:1], uneven)).item() == pytest.approx(expected)
    one = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]], requires_grad=True)
    value = InformationEntropy()(step_of(images, one))
    value.backward()
    assert value.item() == 0
    assert one.grad.isfinite().all()


def test_one_hot_by_hand():
    # The choices have probability ¾ and ½.
    teacher = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    step = step_of(torch.zeros(2, 1, 1, 1), teacher)
    assert OneHot()(step).item() == pytest.approx(expected, rel=1e-6)


def test_activation_by_hand():
    step = InversionStep(
        IMAGE, torch.zeros(1), torch.zeros(1, 2), features=torch.tensor([[1.0, -3.0, 0.5]])
    )
    assert Activation()(step).item() == pytest.approx(-1.5)
