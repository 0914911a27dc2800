"""Sparse inversion: which patches are left, and what the network is given of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer
from torchvision.models import VisionTransformer as TorchvisionViT

from dreamkit.errors import TeacherMismatch
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.plugins import build_registries
from dreamkit.recipe.construct import Builder
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine, Evaluation
from dreamkit.synthesizers.stage import Stage
from dreamkit.synthesizers.token_dropping import (
    TokenDropping,
    TokenEntry,
    TokenGate,
    token_entry,
)
from dreamkit.synthesizers.views import View
from dreamkit.types import BatchPlan

SIZE = (3, 16, 16)
ENTRY = TokenEntry("0", 0, (4, 4))


def vit(**changes):
    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(img_size=16, patch_size=4, **(sizes | changes)).eval()


@pytest.fixture
def teacher_of(toys):
    return lambda model: toys.teacher(model, toys.card(input_size=SIZE))


def spread_out(patches):
    """Return an image (N, 1, 16, 16) of patches' values (N, 1, 4, 4)."""
    return patches.repeat_interleave(4, 2).repeat_interleave(4, 3)


def gradient_of(energies):
    """Return a gradient (N, 1, 16, 16) whose 16 patches are of these sizes."""
    return spread_out(torch.tensor(energies).float().view(-1, 1, 4, 4))


# --- which are left ---------------------------------------------------------------------------


def test_a_share_of_those_left_goes_and_none_comes_back():
    gate = TokenGate(ENTRY, TokenDropping(1 / 3, (2, 3)))
    rising = torch.arange(16).repeat(2, 1)
    gate.seen(1, gradient_of(rising.tolist()))
    assert gate.left is None
    gate.seen(2, gradient_of(rising.tolist()))
    first = gate.left.flatten(1)
    assert first.nonzero()[:, 1].view(2, -1).tolist() == [list(range(5, 16))] * 2
    # Those that are gone have no gradient in a run; were they to have one, they are gone still.
    gate.seen(3, gradient_of((15 - rising).tolist()))
    assert gate.left.flatten(1).nonzero()[:, 1].view(2, -1).tolist() == [list(range(5, 13))] * 2


def test_gradients_add_up_between_and_each_image_has_patches_of_its_own():
    gate = TokenGate(ENTRY, TokenDropping(0.9, (2,)))
    small, large = [0.0] * 16, [0.0] * 16
    small[3], large[8] = 2.0, 3.0
    gate.seen(1, gradient_of([large, small]))
    gate.seen(2, gradient_of([small, small]))
    assert gate.left.flatten(1).sum(1).tolist() == [2, 2]
    assert gate.left.flatten(1)[0].nonzero().flatten().tolist() == [3, 8]
    assert bool(gate.left.flatten(1)[1, 3])


def test_two_patches_are_always_left():
    gate = TokenGate(ENTRY, TokenDropping(0.99, (1, 2, 3)))
    for step in (1, 2, 3):
        gate.seen(step, torch.ones(2, 3, 16, 16))
    assert gate.left.flatten(1).sum(1).tolist() == [2, 2]


def test_one_patch_at_least_goes():
    gate = TokenGate(ENTRY, TokenDropping(0.01, (1,)))
    gate.seen(1, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert gate.left.flatten(1).sum(1).tolist() == [15, 15]


def test_steps_with_fewer_patches_are_worth_less():
    found = TokenDropping(1 / 3, (50, 100, 200, 300)).worth(240)
    assert found == pytest.approx(50 + 50 * 2 / 3 + 100 * 4 / 9 + 40 * 8 / 27)
    assert TokenDropping().worth(50) == 50


# --- what passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [(0, 0, 0), (4, -8, 0), (-4, 4, 1), (1, -1, 0)])
def test_patches_that_are_left_pass_wherever_a_view_moves_them(draw):
    model, draws = nn.Sequential(nn.Identity()), torch.tensor(draw)
    gate = TokenGate(ENTRY, TokenDropping(0.5, (1,)))
    number = spread_out(torch.arange(16.0).view(1, 1, 4, 4))
    wanted = torch.zeros(16)
    wanted[[1, 2, 5, 7, 8, 11, 12, 14]] = 1
    tokens = F.avg_pool2d(View.apply(number, draws), 4).flatten(2).transpose(1, 2)
    hook = model[0].register_forward_pre_hook(gate.filtered)
    gate.seen(1, gradient_of([wanted.tolist()]))
    with gate.shut(draws):
        passed = model(tokens)
    assert torch.equal(model(tokens), tokens)  # it is open again
    hook.remove()
    found = passed.flatten().sort().values
    expected = wanted.nonzero().flatten().float()
    near = draw[0] % 4 or draw[1] % 4  # within a patch: it holds a strip of its neighbours
    assert found.shape == expected.shape
    if not near:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_transformer_is_given_the_tokens_left_and_those_of_no_patch(teacher_of, registers):
    model, extra = vit(reg_tokens=registers), 1 + registers
    entry = token_entry(teacher_of(model))
    assert entry == TokenEntry("blocks.0", extra, (4, 4))
    images, given, put_out = torch.randn(2, *SIZE), [], []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: put_out.append(inputs[0]))
    gate = TokenGate(entry, TokenDropping(0.5, (1,)))
    gate.seen(1, images)
    model.blocks[0].register_forward_pre_hook(gate.filtered)
    with gate.shut(torch.zeros(3)), torch.no_grad():
        model(images)  # the first hook sees all, the gate stands behind it
    places = [left.flatten().nonzero().flatten() + extra for left in gate.left]
    with torch.no_grad():  # the gate is open
        for image, own in enumerate(places):
            alone = given[0][image : image + 1, torch.cat([torch.arange(extra), own])]
            assert torch.allclose(put_out[0][image], model.blocks[0](alone)[0], atol=1e-5)
    assert put_out[0].shape == (2, 8 + extra, 12)


def swin():
    return SwinTransformer(
        [4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2], num_classes=3
    )


def convnext():
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), patch_size=1, num_classes=3)


def mixer():
    return MlpMixer(img_size=16, patch_size=4, num_blocks=1, embed_dim=8, num_classes=3)


def places_later():
    """Adds positions to the output of the first block."""
    model = vit(pos_embed="none")
    model.blocks.insert(1, AddsPlaces(12))
    return model


class AddsPlaces(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 17, channels))

    def forward(self, x):
        return x + self.places[:, : x.shape[1]]


class NeedsAll(nn.Module):
    """Looks at how many tokens there are, and not at their order."""

    def forward(self, x):
        assert x.shape[1] == 17
        return x


def needs_all():
    model = vit()
    model.blocks.insert(1, NeedsAll())
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (swin, "no blocks that are given them as tokens"),
        (convnext, "no blocks that are given them as tokens"),
        (mixer, "takes all of them alone"),
        (places_later, "tells patches' places only after they are tokens"),
        (needs_all, "takes all of them alone"),
    ],
)
def test_what_takes_no_fewer_tokens_is_refused(teacher_of, model, why):
    teacher = teacher_of(model().eval())
    with pytest.raises(TeacherMismatch, match=why) as caught:
        DeepInversion(token_dropping=TokenDropping()).check(teacher)
    assert caught.value.path == ("token_dropping",)
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())


# --- dreaming ---------------------------------------------------------------------------------


def twelve_steps(*after, **options):
    """Return an inversion of four images that drops half of the patches after some steps."""
    return DeepInversion(
        regularizers=(),
        images=4,
        batch_size=4,
        stages=(Stage(12),),
        jitter=0,
        parameterisation=Pixels(),
        token_dropping=TokenDropping(0.5, after),
        engine=Engine("float32"),
        **options,
    )


def torchvision_vit():
    return TorchvisionViT(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
        num_classes=3,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("model", "block", "head"),
    [
        (vit, "blocks.1", "head.weight"),
        (torchvision_vit, "encoder.layers.encoder_layer_1", "heads.head.weight"),
    ],
)
def test_steps_see_fewer_tokens_and_the_rest_of_the_image_stays(teacher_of, model, block, head):
    torch.manual_seed(0)
    teacher, counts, shown = teacher_of(model()), [], []
    nn.init.normal_(teacher.model.get_parameter(head))  # torchvision's is 0 at first
    options = twelve_steps(4, 8, betas=(0.0, 0.9))
    teacher.model.get_submodule(block).register_forward_pre_hook(
        lambda module, inputs: counts.append(inputs[0].shape[1])
    )
    with options.session(teacher, torch.device("cpu")) as session:
        counts.clear()
        session.watch(lambda images, labels: shown.append(images.clone()))
        session.dream(BatchPlan(0, 0, 4, 1), lambda step, terms: None)
        taken = counts[:12]
        estimate = session.prepare(4)
    assert taken == [17] * 4 + [9] * 4 + [5] * 4
    assert estimate.seconds > 0
    moved = F.avg_pool2d((shown[11] - shown[8]).abs().sum(1, keepdim=True), 4).flatten(1)
    assert ((moved > 0).sum(1) <= 4).all()
    assert (moved > 0).any()


@pytest.mark.parametrize("draw", [(0, 0, 0), (4, -8, 1)])
def test_at_random_each_step_and_each_image_leaves_out_others(draw):
    gate = TokenGate(ENTRY, TokenDropping(0.5, by="random"))
    model, passed = nn.Sequential(nn.Identity()), []
    number = spread_out(torch.arange(16.0).view(1, 1, 4, 4)).repeat(3, 1, 1, 1)
    model[0].register_forward_pre_hook(gate.filtered)

    def evaluate(images, labels, draw, colours):
        patches = F.avg_pool2d(View.apply(images, draw), 4).flatten(2).transpose(1, 2)
        passed.append(model(patches).flatten(1).sort().values)
        return Evaluation({}, torch.tensor(0.0), torch.zeros_like(images))

    def steps(seed):
        passed.clear()
        run = gate.begin(evaluate, 200, torch.Generator().manual_seed(seed))
        for _ in range(200):
            run(number, torch.zeros(3), torch.tensor(draw), None)
            assert not gate.has_dropped  # losses of two steps are of as many patches
        return torch.stack(passed)

    found = steps(0)
    assert found.shape == (200, 3, 8)
    assert (found.diff(dim=2) > 0).all(), "no patch comes twice"
    times = torch.bincount(found.flatten().long())
    assert times.shape == (16,)
    assert ((times - 300).abs() < 5 * (600 * 0.25) ** 0.5).all()
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found, steps(0))
    assert not torch.equal(found, steps(1))


def test_at_random_the_same_plan_makes_the_same_dreams(teacher_of):
    teacher, given = teacher_of(vit()), TokenDropping(0.5, by="random")
    options, counts = twelve_steps(4), []
    options = dataclasses.replace(options, token_dropping=given)
    teacher.model.blocks[1].register_forward_pre_hook(
        lambda module, inputs: counts.append(inputs[0].shape[1])
    )
    with options.session(teacher, torch.device("cpu")) as session:
        counts.clear()
        first = session.dream(BatchPlan(0, 0, 4, 1), lambda step, terms: None)
        assert counts[:12] == [9] * 12
        again = session.dream(BatchPlan(0, 0, 4, 1), lambda step, terms: None)
    assert torch.equal(first.images, again.images)
    assert given.worth(12) == 6


def test_what_is_left_out_when_is_noted(teacher_of):
    notes = []
    options = DeepInversion(images=2, token_dropping=TokenDropping(0.5, (5, 10)))
    with options.session(teacher_of(vit()), torch.device("cpu"), note=notes.append) as session:
        assert session.choices["compile"] is False
    (note,) = [note for note in notes if note.startswith("token_dropping")]
    assert "50% of the patches that are left go after each of the steps 5, 10" in note
    options = DeepInversion(images=2, token_dropping=TokenDropping(0.25, by="random"))
    with options.session(teacher_of(vit()), torch.device("cpu"), note=notes.append):
        _, note = [note for note in notes if note.startswith("token_dropping")]
    assert "each step leaves out 25% of the patches, at random, before blocks.0" in note
    assert "before blocks.0" in note


def test_the_best_is_of_the_steps_after_the_last_drop(teacher_of):
    torch.manual_seed(0)
    losses = []
    options = twelve_steps(6, 11, 12, patience=100)
    with options.session(teacher_of(vit()), torch.device("cpu")) as session:
        dream = session.dream(
            BatchPlan(0, 0, 4, 1), lambda step, terms: losses.append(float(terms["loss"]))
        )
    assert dream.loss == pytest.approx(losses[11])
    assert min(losses[:11]) < losses[11]  # fewer patches, a greater loss


def test_patches_with_a_rest_are_refused(toys):
    model = VisionTransformer(
        img_size=18, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )
    teacher = toys.teacher(model.eval(), toys.card(input_size=(3, 18, 18)))
    with pytest.raises(TeacherMismatch, match="which do not divide images of 18x18") as caught:
        token_entry(teacher)
    assert caught.value.path == ("token_dropping",)


def test_as_a_recipe_has_it():
    builder = Builder(build_registries())

    def entry(**options):
        data = {"name": "deepinversion", **options}
        return builder.build(lambda given: builder.entry("synthesizers", given), data)

    made, problems = entry(token_dropping={"share": 0.25, "after": [10, 20]})
    assert problems == []
    assert made.token_dropping == TokenDropping(0.25, (10, 20))
    _, problems = entry(token_dropping={"share": 1.0})
    assert problems[0].path[-2:] == ("token_dropping", "share")
