"""BatchNorm statistics: which layers, which numbers, and that the hooks go."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.synthesizers.bn_statistics import (
    batch_norm_layers,
    channel_statistics,
    image_statistics,
    tapped,
)


def pattern(*shape):
    total = int(torch.tensor(shape).prod())
    return (torch.arange(total) * 37 % 101).float().view(shape) / 10 - 3


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


def test_by_hand():
    # Channel 0 holds 1, 3 | 5, 7: mean 4, biased variance (9+1+1+9)/4 = 5 (unbiased 20/3).
    # Channel 1 holds 2, 2 | 2, 6: mean 3, biased variance (1+1+1+9)/4 = 3.
    x = torch.tensor([[[[1.0, 3]], [[2.0, 2]]], [[[5.0, 7]], [[2.0, 6]]]])
    bn = nn.BatchNorm2d(2).eval()
    with tapped(bn) as tap:
        _, (layer,) = tap(x)
    assert layer.mean.tolist() == [4, 3]
    assert layer.var.tolist() == pytest.approx([5, 3], rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (7, 5)),
        (nn.BatchNorm1d(5), (7, 5, 3)),
        (nn.BatchNorm2d(5), (4, 5, 3, 6)),
        (BatchNormAct2d(5), (4, 5, 3, 6)),
        (FrozenBatchNorm2d(5), (4, 5, 3, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_equal_to_a_direct_float64_computation(layer, shape):
    x = pattern(*shape)
    layer.eval()
    with tapped(layer) as tap:
        _, (seen,) = tap(x)
    rows = x.double().transpose(0, 1).reshape(5, -1)
    mean = rows.sum(1) / rows.shape[1]
    var = ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
    torch.testing.assert_close(seen.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen.var.double(), var, rtol=1e-6, atol=1e-6)
    assert seen.running_mean is layer.running_mean
    assert seen.running_var is layer.running_var


def test_layers_of_a_network_in_forward_order_with_their_inputs(toys):
    model = toys.two_bn()
    x = pattern(4, 3, 8, 8)
    with tapped(model) as tap:
        logits, (first, second) = tap(x)
    assert torch.equal(logits, model(x))
    assert (first.name, second.name) == ("bn1", "bn2")
    seen = model.conv1(x)
    torch.testing.assert_close(first.mean, seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    seen = model.conv2(model.bn1(seen).relu())
    torch.testing.assert_close(second.var, seen.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)


def test_forward_order_is_not_order_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = nn.BatchNorm2d(2)
            self.early = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.late(self.early(x))

    model = Backwards().eval()
    with tapped(model) as tap:
        _, layers = tap(pattern(2, 2, 3, 3))
    assert [layer.name for layer in layers] == ["early", "late"]


def test_bfloat16_inputs_give_float32_statistics():
    bn = nn.BatchNorm2d(2).eval().to(torch.bfloat16)
    x = (1000 + pattern(8, 2, 16, 16)).to(torch.bfloat16)
    with tapped(bn) as tap:
        _, (layer,) = tap(x)
    assert layer.mean.dtype == layer.var.dtype == torch.float32
    exact = x.double().mean((0, 2, 3))
    torch.testing.assert_close(layer.mean.double(), exact, rtol=1e-6, atol=0)


def test_which_layers_count():
    model = nn.ModuleDict(
        {
            "bn1d": nn.BatchNorm1d(2),
            "bn2d": nn.BatchNorm2d(2),
            "timm": BatchNormAct2d(2),
            "frozen": FrozenBatchNorm2d(2),
            "sync": nn.SyncBatchNorm(2),
            "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "group": nn.GroupNorm(1, 2),
            "layer": nn.LayerNorm(2),
            "no_statistics": nn.BatchNorm2d(2, track_running_stats=False),
        }
    )
    found = [name for name, _ in batch_norm_layers(model)]
    assert found == ["bn1d", "bn2d", "timm", "frozen", "sync"]


def test_hooks_are_removed_after_the_block(toys):
    model = toys.two_bn()
    with tapped(model):
        assert hooks(model) == 2
    assert hooks(model) == 0


def test_hooks_are_removed_after_an_exception(toys):
    model = toys.two_bn()

    def fail():
        with tapped(model):
            model(torch.zeros(1, 99, 8, 8))

    with pytest.raises(RuntimeError, match="channels"):
        fail()
    assert hooks(model) == 0


def test_passes_of_others_leave_no_trace(toys):
    model = toys.two_bn()
    x = pattern(2, 3, 8, 8)
    with tapped(model) as outer:
        with tapped(model) as inner:
            _, seen = inner(x)
        model(100 * x)
        _, again = outer(x)
    assert [layer.name for layer in again] == ["bn1", "bn2"]
    assert torch.equal(again[0].mean, seen[0].mean)


def test_a_layer_that_is_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(2 * self.bn(x))

    with tapped(Twice().eval()) as tap:
        _, layers = tap(pattern(2, 2, 3, 3))
    assert [layer.name for layer in layers] == ["bn", "bn#2"]


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (4, 5, 3, 6)])
def test_gradients_of_the_statistics_equal_those_of_their_definition(shape):
    x = pattern(*shape).requires_grad_()
    weights = torch.linspace(-1, 1, 5), torch.linspace(1, 3, 5)
    mean, var = channel_statistics(x, torch.zeros(5))
    (found,) = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), [x])
    exact = x.detach().double().requires_grad_()
    axes = [0, *range(2, len(shape))]
    expected_mean = exact.mean(axes)
    expected_var = exact.var(axes, correction=0)
    (expected,) = torch.autograd.grad(
        (weights[0] * expected_mean + weights[1] * expected_var).sum(), [exact]
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_keep_their_input_and_no_float32_copy_of_it():
    x = pattern(4, 5, 8, 8).to(torch.bfloat16).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        channel_statistics(x, torch.zeros(5))
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != x.data_ptr()) <= 5 * 4
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_a_constant_channel_has_no_variance_and_a_finite_gradient():
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    mean, var = channel_statistics(x, torch.zeros(2))
    assert var.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(mean.sum() + var.sum(), [x])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (4, 5, 3, 6), (4, 3, 6, 5)])
def test_statistics_of_each_image_equal_a_direct_computation(shape):
    x = pattern(*shape)
    layer = FrozenBatchNorm2d(5).eval()
    layer.forward = lambda x: x  # what it is given is looked at, in any layout
    with tapped(layer, each_image=True) as tap:
        _, (seen,) = tap(x)
    assert seen.images is not None
    last = shape[1] != 5
    rows = (x.movedim(-1, 1) if last else x).double().reshape(shape[0], 5, -1)
    torch.testing.assert_close(seen.images.mean.double(), rows.mean(2), rtol=1e-6, atol=1e-6)
    expected = rows.var(2, correction=0)
    torch.testing.assert_close(seen.images.var.double(), expected, rtol=1e-5, atol=1e-6)
    # All together are what a pass without them gives.
    with tapped(layer) as tap:
        _, (batch,) = tap(x)
    assert batch.images is None
    torch.testing.assert_close(seen.mean, batch.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.var, batch.var, rtol=1e-5, atol=1e-6)


def test_windows_of_an_image_count_as_one_image():
    x = pattern(6, 5, 2, 2)  # 2 images of 3 windows, one after the other
    found = image_statistics(x, images=2, channels=5)
    whole = x.view(2, 3, 5, 4).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(found.mean, whole.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.var, whole.var(2, correction=0), rtol=1e-5, atol=1e-6)
    assert image_statistics(x, images=4, channels=5).mean.shape == (6, 5)  # they do not divide


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (7, 5)), (nn.BatchNorm2d, (4, 5, 3, 6)), (nn.BatchNorm3d, (2, 5, 2, 3, 4))],
)
def test_the_gradient_through_a_layer_and_its_statistics_is_autograds(kind, shape, affine):
    layer = settled(kind(5, affine=affine))
    weight = pattern(*shape).flip(0) / 7

    def loss(x, output, mean, var):
        return (output.relu_() * weight).sum() + mean.square().sum() + (var - 1).square().sum()

    x = pattern(*shape).requires_grad_()
    with tapped(layer) as tap:
        output, (seen,) = tap(x)
        (found,) = torch.autograd.grad(loss(x, output, seen.mean, seen.var), x)
    assert torch.equal(output.detach(), layer(x).detach().relu())
    rows = x.transpose(0, 1).flatten(1)
    plain = loss(x, layer(x), rows.mean(1), rows.var(1, correction=0))
    (expected,) = torch.autograd.grad(plain, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def settled(layer):
    """Return a frozen layer whose statistics and weights are none of a new one's."""
    layer.running_mean.copy_(torch.linspace(-1, 1, 5))
    layer.running_var.copy_(torch.linspace(0.5, 2, 5))
    if layer.weight is not None:
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    return layer.eval().requires_grad_(False)


def test_a_layer_of_timm_is_normalised_dropped_out_and_activated():
    layer = settled(BatchNormAct2d(5, act_layer=nn.ReLU6, drop_layer=nn.Dropout))
    weight = pattern(4, 5, 3, 6).flip(0) / 7
    x = pattern(4, 5, 3, 6).requires_grad_()
    with tapped(layer) as tap:
        assert "forward" in vars(layer)  # not by a hook, which takes two passes more
        output, (seen,) = tap(x)
        (found,) = torch.autograd.grad((output * weight).sum() + seen.var.square().sum(), x)
    assert torch.equal(output, layer(x))
    assert output.min() == 0
    variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
    (expected,) = torch.autograd.grad((layer(x) * weight).sum() + variance.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_derived_does_what_it_does():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(2)).eval()
    x = pattern(2, 2, 3, 3)
    with tapped(model) as tap:
        output, (seen,) = tap(x)
    assert torch.equal(output, model(x))
    assert seen.name == "0"
