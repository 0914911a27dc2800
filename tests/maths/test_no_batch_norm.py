"""Inversion of networks without BatchNorm: what their blocks put out, and the terms that see it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.models import VisionTransformer as TorchvisionViT

from dreamkit.checkup.doctor import diagnose
from dreamkit.errors import DreamkitError, TeacherMismatch
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.plugins import build_registries
from dreamkit.recipe.construct import Builder
from dreamkit.registry import Term
from dreamkit.regularizers.gram import Gram
from dreamkit.regularizers.patch_similarity import PatchSimilarity, differential_entropy
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.synthesizers.automatic_terms import (
    PATCHES,
    SHIFTS,
    STATISTICS,
    parameterisation_for,
    spectrum_for,
    terms_for,
)
from dreamkit.synthesizers.block_outputs import (
    MOST_PATCHES,
    Block,
    check_patches,
    feature_blocks,
    outputs_of,
)
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import check_terms
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.intake import admit
from dreamkit.types import BatchPlan, InversionStep

CPU = torch.device("cpu")
SIZE = (3, 32, 32)


def vit(image=32, patch=8, **changes):
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(img_size=image, patch_size=patch, **(sizes | changes)).eval()


def torchvision_vit():
    return TorchvisionViT(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
        num_classes=3,
    ).eval()  # fmt: skip


def swin():
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2],
        num_classes=3,
    ).eval()  # fmt: skip


def convnext():
    return ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 12, 12, 12), patch_size=4, num_classes=3
    ).eval()  # fmt: skip


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(4),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


@pytest.fixture
def teacher_of(toys):
    def make(model, size=SIZE):
        return toys.teacher(model, toys.card(input_size=size))

    return make


def patches_step(*blocks):
    images = torch.zeros(len(blocks[0]), 1, 1, 1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return InversionStep(images, labels, torch.zeros(len(images), 2), block_outputs=blocks)


def seen(teacher, images):
    blocks = feature_blocks(teacher)
    with outputs_of(teacher.model, blocks) as tap:
        teacher.model(images)
        return {b.name: out for b, out in zip(blocks, tap.outputs(), strict=True)}


# --- the terms, by hand -----------------------------------------------------------------------


def test_the_entropy_of_one_kernel_is_a_gaussians():
    values = torch.full((2, 5), 0.3)
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.05**2)
    assert differential_entropy(values, 0.05).tolist() == pytest.approx([expected] * 2, abs=1e-3)


def test_values_at_the_ends_are_whole():
    values = torch.tensor([[1.0] * 4, [-1.0] * 4])
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.05**2)
    assert differential_entropy(values, 0.05).tolist() == pytest.approx([expected] * 2, abs=1e-3)


def test_two_kernels_far_apart_add_ln_2():
    values = torch.tensor([[-0.6, 0.4, -0.6, 0.4]])
    one = 0.5 * math.log(2 * math.pi * math.e * 0.02**2)
    assert differential_entropy(values, 0.02).item() == pytest.approx(one + math.log(2), abs=1e-3)


def test_patch_similarity_is_minus_the_mean_entropy_of_pairs():
    # Three patches in a plane, at 0°, 90° and 180°: cosines 0, -1 and 0.
    plane = torch.tensor([[[2.0, 0], [0, 3], [-1, 0]]])
    alike = torch.ones(1, 3, 2)
    entropy = differential_entropy(torch.tensor([[0.0, -1, 0]]), 0.1)
    one = differential_entropy(torch.tensor([[1.0]]), 0.1)
    found = PatchSimilarity(bandwidth=0.1)(patches_step(plane, alike))
    assert found.shape == ()
    assert found.item() == pytest.approx(-(entropy + one).item() / 2, rel=1e-5)


def test_gram_by_hand():
    right = torch.tensor([[[1.0, 0], [0, 5]], [[1.0, 0], [0, 5]]])  # nothing in common: 0
    alike = torch.ones(2, 2, 2)  # 0 1 | 1 0: 2/4
    within = Gram(between=0)(patches_step(right, alike))
    assert within.item() == pytest.approx((0 + 0.5) / 2)
    # Both images have the same mean: 0 1 | 1 0 again.
    assert Gram(within=0)(patches_step(right)).item() == pytest.approx(0.5)
    assert Gram(2.0, 4.0)(patches_step(alike)).item() == pytest.approx(2 * 0.5 + 4 * 0.5)
    opposed = torch.tensor([[[1.0, 0], [0, 1]], [[1.0, 0], [0, -1]]])  # means at right angles
    assert Gram()(patches_step(opposed)).item() == pytest.approx(0, abs=1e-6)


def test_so_many_patches_are_compared_as_an_option_says():
    block = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0]]])  # 0, 2 and 4
    few = Gram(between=0, patches=3)(patches_step(block))
    assert few.item() == pytest.approx(2 / 9)  # the first and the last are alike
    assert Gram(between=0)(patches_step(block)).item() == pytest.approx((3 * 2 + 2 * 1) / 25)


@pytest.mark.parametrize("term", [PatchSimilarity(bandwidth=0.2), Gram()])
def test_gradients_are_those_of_finite_differences(term):
    draws = torch.Generator().manual_seed(0)
    block = torch.randn(2, 5, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: term(patches_step(b)), (block,), atol=1e-4)


@pytest.mark.parametrize("term", [PatchSimilarity(), Gram()])
def test_dead_patches_have_a_finite_gradient(term):
    block = torch.zeros(2, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(term(patches_step(block)), block)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("term", [PatchSimilarity(), Gram()])
def test_a_step_without_blocks_is_a_mistake_of_the_caller(term):
    with pytest.raises(DreamkitError, match="needs 'block_outputs'"):
        term(InversionStep(torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), torch.zeros(1, 2)))


# --- which outputs, and in what shape ---------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names", "shapes"),
    [
        (vit, ["blocks.0", "blocks.1"], [(16, 12)] * 2),
        (torchvision_vit, [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)], [(16, 8)] * 2),
        (swin, ["features.1.0", "features.3.0"], [(64, 8), (16, 16)]),
        # The last stage has one position of an image.
        (convnext, [f"stages.{i}.blocks.0" for i in (0, 1, 2)], [(64, 8), (16, 12), (4, 12)]),
        (vgg, ["0", "3"], [(196, 6), (64, 8)]),
    ],
)
def test_blocks_of_every_family_are_seen_patch_by_patch(teacher_of, model, names, shapes):
    found = seen(teacher_of(model()), torch.randn(3, *SIZE))
    assert list(found) == names
    assert [tuple(out.shape) for out in found.values()] == [(3, *shape) for shape in shapes]


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_of_the_class_and_registers_are_no_patches(teacher_of, registers):
    model = vit(reg_tokens=registers)
    images, outputs = torch.randn(2, *SIZE), []
    hook = model.blocks[1].register_forward_hook(lambda m, x, y: outputs.append(y))
    model(images)
    hook.remove()
    expected = outputs[0][:, 1 + registers :]
    assert expected.shape[1] == 16
    assert torch.equal(seen(teacher_of(model), images)["blocks.1"], expected)


def test_channels_are_told_from_positions_where_both_are_as_many(teacher_of):
    model, images, outputs = convnext(), torch.randn(2, *SIZE), []
    hook = model.stages[0].blocks[0].register_forward_hook(lambda m, x, y: outputs.append(y))
    model(images)
    hook.remove()
    assert outputs[0].shape == (2, 8, 8, 8)
    found = seen(teacher_of(model), images)["stages.0.blocks.0"]
    assert torch.equal(found, outputs[0].flatten(2).transpose(1, 2))


def test_layers_are_seen_before_what_works_on_them_in_place(teacher_of):
    model, images = vgg(), torch.randn(2, *SIZE)
    expected = model[3](model[2](model[0](images).relu()))
    found = seen(teacher_of(model), images)["3"]
    assert torch.allclose(found, expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert (found < 0).any()


def test_large_maps_are_looked_at_in_evenly_spread_places():
    places = torch.arange(40.0 * 40).view(1, 1, 40, 40)
    found = Block("any", channels_last=False).patches(places)
    assert found.shape == (1, MOST_PATCHES, 1)
    steps = found.flatten().diff()
    assert found.flatten()[[0, -1]].tolist() == [0, 1599]
    assert set(steps.tolist()) == {8.0, 9.0}


def test_a_network_comes_back_as_it_was(teacher_of):
    model = vit()
    seen(teacher_of(model), torch.randn(2, *SIZE))
    assert not any(module._forward_hooks for module in model.modules())


# --- which terms ------------------------------------------------------------------------------


def test_terms_are_chosen_by_what_a_teacher_has(toys, teacher_of):
    notes = []
    assert terms_for("auto", toys.teacher(toys.two_bn()), notes.append) == STATISTICS
    assert notes == []
    spectrum = spectrum_for(teacher_of(vit()).card)
    assert [term.name for term in spectrum] == ["natural_spectrum"]
    assert terms_for("auto", teacher_of(vgg()), notes.append) == (*PATCHES, *spectrum)
    assert terms_for("auto", teacher_of(vit()), notes.append) == (*PATCHES, *SHIFTS, *spectrum)
    without, note = notes
    assert "feature_prior" not in without
    assert "patch_similarity 0.1, feature_prior 1, natural_spectrum 1" in note
    grey = toys.card(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    assert terms_for("auto", toys.teacher(vit(in_chans=1), grey)) == (*PATCHES, *SHIFTS)
    assert "2 modules, blocks.0 to blocks.1" in note
    given = (Term("tv", 1.0, TotalVariation()),)
    assert terms_for(given, teacher_of(vit())) == given


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.05, 1.15)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (-0.08, 0.52)),  # as timm's vision transformers
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.46, 0.26)),
    ],
)
def test_photographs_are_told_as_the_teacher_is_shown_them(toys, mean, std, expected):
    (term,) = spectrum_for(toys.card(input_size=SIZE, mean=mean, std=std))
    assert (term.entry.mean, term.entry.deviation) == pytest.approx(expected)


def test_a_teacher_without_statistics_has_a_steeper_spectrum(toys, teacher_of):
    assert parameterisation_for(None, toys.teacher(toys.two_bn())).decay == 1.5
    assert parameterisation_for(None, teacher_of(vit())).decay == 1.75
    assert parameterisation_for(Pixels(), teacher_of(vit())) == Pixels()


def test_a_teacher_with_nothing_to_see_is_refused(teacher_of):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(TeacherMismatch, match="tokens or feature maps") as caught:
        DeepInversion().check(teacher_of(plain))
    assert caught.value.path == ("regularizers",)
    assert "no BatchNorm" in caught.value.message
    assert "DeepDream: tv and l2" in caught.value.message
    with pytest.raises(TeacherMismatch, match="gram compares patches") as caught:
        check_terms((Term("gram", 1.0, Gram()),), teacher_of(plain))
    assert caught.value.path == ("regularizers", 0)


def test_patches_that_do_not_divide_the_image_are_refused(teacher_of):
    teacher = teacher_of(vit(image=34), (3, 34, 34))
    with pytest.raises(
        TeacherMismatch, match=r"8x8 pixels, which do not divide .* 34x34"
    ) as caught:
        DeepInversion().check(teacher)
    assert "2 rows and 2 columns" in caught.value.message
    assert "Give it images of 32x32" in caught.value.message
    assert caught.value.path == ("regularizers",)
    check_patches(teacher_of(vit()), (32, 32))
    check_patches(teacher_of(vgg(), (3, 17, 17)), (17, 17))  # its stride is 1


def test_auto_is_a_word_where_it_may_stand_and_else_a_name():
    builder = Builder(build_registries())

    def entry(**options):
        return builder.build(lambda data: builder.entry("synthesizers", data), options)

    made, problems = entry(name="deepinversion", regularizers="auto")
    assert (made.regularizers, problems) == ("auto", [])
    _, problems = entry(name="dafl", regularizers="auto")
    assert "no name 'auto'" in problems[0].message


# --- dreaming ---------------------------------------------------------------------------------


class WithLogits(nn.Module):
    """Returns an object with logits, as transformers' classifiers do."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixel_values):
        return {"logits": self.body(pixel_values)}


@pytest.mark.parametrize("model", [vit, swin, convnext, vgg, lambda: WithLogits(vit())])
def test_a_network_with_random_weights_is_dreamed_and_the_loss_falls(teacher_of, model):
    torch.manual_seed(0)
    teacher = admit(teacher_of(model()), learnt=False)
    options = DeepInversion(
        images=4, batch_size=4, stages=(Stage(40),), engine=Engine("float32", compile=False)
    )
    losses, notes = [], []
    with options.session(teacher, CPU, note=notes.append) as session:
        dream = session.dream(
            BatchPlan(0, 0, 4, 1), lambda step, terms: losses.append(SimpleNamespace(**terms))
        )
    assert dream.images.shape == (4, *SIZE)
    assert any("auto is patch_similarity" in note for note in notes)
    assert min(x.loss for x in losses[-3:]) < losses[0].loss
    for term in terms_for("auto", teacher):
        assert all(getattr(x, term.name).isfinite() for x in losses)


def test_doctor_says_what_a_teacher_is_inverted_by(teacher_of, capsys):
    from rich.console import Console

    found = diagnose(teacher_of(vit()), CPU, 2, console=Console(width=400))
    assert found.uninvertible is None
    assert found.bn_layers == 0
    said = capsys.readouterr().out
    assert "inversion: yes, without BatchNorm: by patch_similarity" in said
    assert "of what 2 blocks or layers put out" in said
