"""What LayerNorm and GroupNorm make of a batch, and the term that sees it."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GroupNormAct, LayerNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import SwinTransformer

from dreamkit.errors import DreamkitError, TeacherMismatch
from dreamkit.registry import Term
from dreamkit.regularizers.feature_prior import FeaturePrior
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import check_terms
from dreamkit.synthesizers.norm_means import means_of, norm_layers
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, InversionStep, NormMeans

SIZE = (3, 16, 16)


def body(*layers):
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()


@pytest.fixture
def teacher_of(toys):
    return lambda model: toys.teacher(model, toys.card(input_size=SIZE))


def layer(mean, scale):
    return NormMeans("any", torch.tensor(mean), torch.tensor(scale))


def step(*layers):
    images = torch.zeros(2, 3, 1, 1)
    return InversionStep(
        images, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), norm_means=layers
    )


def randomised(module):
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


# --- the term ---------------------------------------------------------------------------------


def test_by_hand():
    one = layer([0.5, -1.0], [2.0, 1.0])  # (0.25 * 4 + 1 * 1) / 5
    other = layer([1.0, 1.0], [3.0, -3.0])
    assert FeaturePrior()(step(one)).item() == pytest.approx(0.4)
    assert FeaturePrior()(step(one, other)).item() == pytest.approx((0.4 + 1) / 2)


def test_a_layer_that_puts_out_its_shift_alone_says_nothing():
    mean = torch.ones(3, requires_grad=True)
    value = FeaturePrior()(step(NormMeans("dead", mean, torch.zeros(3))))
    (gradient,) = torch.autograd.grad(value, mean)
    assert value.item() == 0
    assert gradient.isfinite().all()


def test_a_step_without_layers_is_a_mistake_of_the_caller():
    with pytest.raises(DreamkitError, match="needs 'norm_means'"):
        FeaturePrior()(step())


# --- what is seen -----------------------------------------------------------------------------


def norm2d(channels):
    return randomised(LayerNorm2d(channels))


def groups(channels):
    return randomised(nn.GroupNorm(2, channels))


def test_channels_are_told_from_columns_where_both_are_as_many(teacher_of):
    model = body(nn.Conv2d(3, 6, 3, stride=3), norm2d(6))
    images = torch.randn(4, 3, 18, 18)
    outputs = model[1](model[0](images))
    assert outputs.shape == (4, 6, 6, 6)
    with means_of(model, ["1"]) as tap:
        tap.begin()
        model(images)
        (found,) = tap.means()
    expected = (outputs.mean((0, 2, 3)) - model[1].bias) / model[1].weight
    assert torch.allclose(found.mean, expected, atol=1e-5)


@pytest.mark.parametrize("norm", [norm2d, groups])
def test_it_is_the_mean_of_the_output_less_the_shift_by_the_scale(teacher_of, norm):
    model = body(nn.Conv2d(3, 6, 3, padding=1), norm(6))
    images = torch.randn(4, *SIZE)
    outputs = model[1](model[0](images)).mean((0, 2, 3))
    expected = (outputs - model[1].bias) / model[1].weight
    with means_of(model, norm_layers(teacher_of(model))) as tap:
        tap.begin()
        model(images)
        (found,) = tap.means()
    assert found.name == "1"
    assert torch.allclose(found.mean, expected, atol=1e-5)
    assert torch.equal(found.scale, model[1].weight)
    assert not found.scale.requires_grad


def test_an_activation_within_the_layer_does_not_hide_it(teacher_of):
    model = body(nn.Conv2d(3, 6, 3), GroupNormAct(6, num_groups=2))
    plain = nn.GroupNorm(2, 6)
    images = torch.randn(4, *SIZE)
    with means_of(model, norm_layers(teacher_of(model))) as tap:
        tap.begin()
        model(images)
        (found,) = tap.means()
    assert torch.allclose(found.mean, plain(model[0](images)).mean((0, 2, 3)), atol=1e-6)


def test_every_layer_of_a_transformer_in_forward_order(teacher_of):
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3
    ).eval()
    names = [f"blocks.{block}.norm{number}" for block in (0, 1) for number in (1, 2)]
    assert norm_layers(teacher_of(vit)) == [*names, "norm"]
    with means_of(vit, [*names, "norm"]) as tap:
        vit(torch.randn(2, *SIZE))  # of another
        assert tap.means() == ()
        tap.begin()
        vit(torch.randn(2, *SIZE))
        assert [seen.name for seen in tap.means()] == [*names, "norm"]
        assert tap.means() == ()
    assert not any(module._forward_pre_hooks for module in vit.modules())


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.GroupNorm(6, 6), "each channel by itself"),
        (nn.LayerNorm([6, 14, 14]), "over positions too"),
        (nn.GroupNorm(2, 6, affine=False), "no shift"),
        (LayerNorm2d(6, affine=False), "no shift"),
        (nn.BatchNorm2d(6), "stores statistics"),
    ],
)
def test_what_tells_nothing_is_left_out(teacher_of, norm, why):
    assert norm_layers(teacher_of(body(nn.Conv2d(3, 6, 3), norm))) == [], why


# --- in an inversion --------------------------------------------------------------------------


def test_a_teacher_without_such_layers_is_refused(teacher_of):
    term = (Term("feature_prior", 1.0, FeaturePrior()),)
    check_terms(term, teacher_of(body(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6))))
    with pytest.raises(TeacherMismatch, match="LayerNorm and GroupNorm layers, and") as caught:
        check_terms(term, teacher_of(body(nn.Conv2d(3, 6, 3))))
    assert caught.value.path == ("regularizers", 0)


@pytest.mark.parametrize(
    "model",
    [
        lambda: VisionTransformer(
            img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3
        ),
        lambda: SwinTransformer(
            [4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2], num_classes=3
        ),
        lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), patch_size=1, num_classes=3),
    ],
)
def test_dreams_come_to_have_channels_at_their_shifts(teacher_of, model):
    torch.manual_seed(0)
    teacher = teacher_of(model().eval())
    options = DeepInversion(
        regularizers=(Term("feature_prior", 10.0, FeaturePrior()),),
        images=4,
        batch_size=4,
        stages=(Stage(20),),
        engine=Engine("float32", compile=False),
    )
    values = []
    with options.session(teacher, torch.device("cpu")) as session:
        session.dream(
            BatchPlan(0, 0, 4, 1), lambda step, terms: values.append(float(terms["feature_prior"]))
        )
    assert values[-1] < 0.7 * values[0]
