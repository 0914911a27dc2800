"""Importance criteria against explicit gates and a table whose every entry is known."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.criteria.bn_scale import BNScale
from dreamkit.criteria.fpgm import FPGM
from dreamkit.criteria.latency_lut import LatencyLUT
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.criteria.random import Random
from dreamkit.criteria.taylor import Taylor, gate_gradients
from dreamkit.errors import NothingToPrune
from dreamkit.latency.layer_shapes import layer_shapes
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.selection import Limits
from dreamkit.types import ChannelGroup, LayerShape, Member, PruningStep

CPU = torch.device("cpu")


class ProductTable:
    """A layer takes 0.001·c_in·c_out milliseconds, channels counted in whole blocks."""

    def __init__(self, block=1):
        self.block = block

    def prepare(self, shapes):
        self.prepared = list(shapes)

    def predict(self, shape):
        return 0.001 * self.block**2 * -(-shape.c_in // self.block) * -(-shape.c_out // self.block)

    def shapes(self, model, input_size):
        shapes = layer_shapes(model, input_size)
        return {name: shape for name, shape in shapes.items() if shape.kind != "norm"}


def two_batches(toys, labels=3):
    images = toys.card().normalise(toys.images(8).images)
    targets = torch.arange(8) % labels
    return [(images[:5], targets[:5]), (images[5:], targets[5:])]


def step_of(
    toys, model, teacher=None, batches=None, groups=None, chunk=1, size=(3, 8, 8), seed=7, block=1
):
    given = two_batches(toys) if batches is None else batches
    found = ChannelGraph(model, size).groups()[0] if groups is None else groups
    return PruningStep(
        model=model,
        teacher=toys.copy(model) if teacher is None else teacher,
        groups=found,
        card=toys.card(size=size),
        chunks=[Limits(chunk, 1.0, 1).chunks(group, group.channels) for group in found],
        device=CPU,
        batches=lambda: iter(given),
        latency=ProductTable(block),
        generator=torch.Generator().manual_seed(seed),
    )


@contextlib.contextmanager
def gated(model, layers):
    """Multiply the outputs of some layers by ones that have gradients."""
    gates, handles = {}, []
    for name in layers:
        layer = model.get_submodule(name)
        gates[name] = torch.ones(layer.weight.shape[0], requires_grad=True)
        handles.append(
            layer.register_forward_hook(
                lambda m, i, out, g=gates[name]: out * g.view(1, -1, *[1] * (out.dim() - 2))
            )
        )
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def explicit(model, batches, coupled, loss):
    """Return the mean over batches of (Σ of coupled gates' gradients)²."""
    total = 0
    for images, labels in batches:
        with gated(model, coupled) as gates:
            value = loss(model(images), images, labels)
            gradients = torch.autograd.grad(value, list(gates.values()))
        total = total + sum(gradients).square()
    return total / len(batches)


def one_by_one(batches):
    """Return a batch for each image."""
    return [
        (images[i : i + 1], labels[i : i + 1])
        for images, labels in batches
        for i in range(len(labels))
    ]


def cross_entropy(logits, images, labels):
    return F.cross_entropy(logits, labels)


def by_name(step, scores):
    return {group.name: score for group, score in zip(step.groups, scores, strict=True)}


# --- taylor -----------------------------------------------------------------------------------


def test_gates_where_channels_are_read_are_the_papers_after_batch_norm(toys):
    model = toys.two_bn()
    step = step_of(toys, model)
    scores = by_name(step, Taylor(loss="ce")(step))
    assert set(scores) == {"conv1", "conv2"}
    for group, bn in (("conv1", "bn1"), ("conv2", "bn2")):
        expected = explicit(model, one_by_one(two_batches(toys)), [bn], cross_entropy)
        assert expected.max() > 0
        torch.testing.assert_close(scores[group], expected, rtol=1e-4, atol=1e-9)


def test_gates_after_convolutions_where_there_is_no_batch_norm(toys):
    model = toys.plain()
    step = step_of(toys, model)
    scores = by_name(step, Taylor(loss="ce")(step))
    for name in ("conv1", "conv2"):
        expected = explicit(model, one_by_one(two_batches(toys)), [name], cross_entropy)
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-9)


def test_coupled_gates_add_up_before_the_square(toys):
    model = toys.residual()
    step = step_of(toys, model)
    scores = by_name(step, Taylor(loss="ce")(step))
    (coupled,) = [score for score in scores.values() if len(score) == 4]
    together = explicit(model, one_by_one(two_batches(toys)), ["bn1", "bn2"], cross_entropy)
    apart = explicit(model, one_by_one(two_batches(toys)), ["bn1"], cross_entropy) + explicit(
        model, one_by_one(two_batches(toys)), ["bn2"], cross_entropy
    )
    assert not torch.allclose(together, apart, rtol=1e-2), "else this would show nothing"
    torch.testing.assert_close(coupled, together, rtol=1e-4, atol=1e-9)


def test_of_gates_in_series_the_last_tells_the_removal(toys):
    # bn1 → depthwise → bn2: nothing reads the channels before bn2 is through with them.
    model = toys.depthwise()
    step = step_of(toys, model)
    (score,) = [s for s in Taylor(loss="ce")(step) if len(s) == 4]
    expected = explicit(model, one_by_one(two_batches(toys)), ["bn2"], cross_entropy)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


class Inverted(nn.Module):
    """A stem, two inverted residuals (1×1 up, depthwise, 1×1 down) and a classifier."""

    def __init__(self, width=8, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(self.block(width, 4 * width) for _ in range(2))
        self.fc = nn.Linear(width, classes)

    @staticmethod
    def block(width, wide):
        return nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide)),
            *(nn.ReLU6(), nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_importance_compares_groups_as_removing_their_channels_does(toys):
    # To first order importance is a squared change; here, of the loss of each image, by a channel
    # made a hundredth smaller wherever it is read.
    torch.manual_seed(0)
    model = Inverted()
    images = torch.randn(64, 3, 16, 16)
    labels = torch.randint(10, (64,))
    with torch.no_grad():
        for _ in range(30):
            model.train()(images)  # statistics of its own
    model.eval()
    step = step_of(toys, model, batches=[(images, labels)], size=(3, 16, 16))
    found = Taylor(loss="ce")(step)

    def losses():
        with torch.no_grad():
            return F.cross_entropy(model(images).double(), labels, reduction="none")

    whole, smaller = losses(), 0.01
    for group, score in zip(step.groups, found, strict=True):
        changes = []
        for channel in range(group.channels):
            kept = [
                (weight, member.index[member.channel == channel], weight.detach().clone())
                for member in group.members
                if member.axis == "in"
                for weight in [model.get_submodule(member.layer).weight]
            ]
            with torch.no_grad():
                for weight, places, _ in kept:
                    weight[:, places] *= 1 - smaller
                changes.append(((losses() - whole) / smaller).square().mean())
                for weight, _, before in kept:
                    weight.copy_(before)
        expected = torch.stack(changes).float()
        assert float(score.sum() / expected.sum()) == pytest.approx(1, abs=0.05), group.name


@pytest.mark.parametrize("kind", ["before", "behind"])
def test_each_reader_counts_whatever_stands_between(toys, kind):
    # Two branches read the stem's channels, one of them through a BatchNorm of its own.
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.left, self.right = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            x = self.stem(x)
            y = self.bn(F.relu(x)) if kind == "behind" else F.relu(self.bn(x))
            return self.fc((self.left(F.silu(y)) * self.right(F.relu(x))).mean((2, 3)))

    torch.manual_seed(1)
    model = Branches().eval()
    step = step_of(toys, model)
    score = by_name(step, Taylor(loss="ce")(step))["stem"]
    images, labels = (torch.cat(parts) for parts in zip(*two_batches(toys), strict=True))
    total = 0
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        gates = torch.ones(4, requires_grad=True)
        handles = [
            layer.register_forward_pre_hook(lambda m, x, g=gates: (x[0] * g.view(1, -1, 1, 1),))
            for layer in (model.left, model.right)
        ]
        loss = F.cross_entropy(model(image), label)
        total = total + torch.autograd.grad(loss, gates)[0].square() / len(images)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(score, total, rtol=1e-4, atol=1e-9)


def test_linear_layers_read_the_last_axis_of_images_too(toys):
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.conv(x).permute(0, 2, 3, 1)
            return self.fc(F.relu(self.inner(x)).mean((1, 2)))

    torch.manual_seed(0)
    model = ChannelsLast().eval()
    step = step_of(toys, model)
    score = by_name(step, Taylor(loss="ce")(step))["conv"]
    expected = explicit(model, one_by_one(two_batches(toys)), ["conv"], cross_entropy)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


def test_squares_of_batches_are_averaged_not_gradients(toys):
    model, batches = toys.two_bn(), two_batches(toys)
    step = step_of(toys, model)
    scores = by_name(step, Taylor(loss="ce", squares="batch")(step))["conv1"]
    expected = explicit(model, batches, ["bn1"], cross_entropy)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)
    alone = [explicit(model, [batch], ["bn1"], cross_entropy) for batch in batches]
    torch.testing.assert_close(expected, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-12)
    per_image = by_name(step, Taylor(loss="ce")(step))["conv1"]
    assert not torch.allclose(per_image, expected, rtol=0.1), "else this would show nothing"


def test_images_count_the_same_however_they_are_batched(toys):
    model = toys.two_bn()
    ways = [
        by_name(step, Taylor(loss="ce")(step))["conv1"]
        for step in (
            step_of(toys, model),
            step_of(toys, model, batches=one_by_one(two_batches(toys))),
        )
    ]
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-4, atol=1e-9)


def test_a_layer_that_is_called_twice_has_one_gate(toys):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x = self.again(torch.relu_(self.again(self.stem(x))))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().eval()
    step = step_of(toys, model)
    expected = explicit(model, one_by_one(two_batches(toys)), ["stem", "again"], cross_entropy)
    (score,) = Taylor(loss="ce")(step)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("twin", [lambda x: torch.cat([x, x.flip(3)]), lambda x: x[:1]])
def test_rows_that_are_no_images_have_no_gradients_of_their_own(toys, twin):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            parts = self.fc(self.conv(twin(x)).mean((2, 3)))
            return (
                parts.reshape(-1, len(x), 3).sum(0) if len(parts) > 1 else parts.expand(len(x), 3)
            )

    channels = torch.arange(4)
    members = (Member("conv", "out", channels, channels), Member("fc", "in", channels, channels))
    group = ChannelGroup("conv", 4, members)
    model = Odd().eval()
    step = step_of(toys, model, groups=[group], batches=two_batches(toys))
    with pytest.raises(NothingToPrune, match=r"fc is given .* set 'squares: batch'"):
        Taylor(loss="ce")(step)
    (score,) = Taylor(loss="ce", squares="batch")(step)
    expected = explicit(model, two_batches(toys), ["conv"], cross_entropy)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


def test_weights_that_are_taken_past_their_layer_cannot_be_gated(toys):
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(self.conv(x).mean((2, 3)), self.fc.weight)

    channels = torch.arange(4)
    group = ChannelGroup("conv", 4, (Member("fc", "in", channels, channels),))
    with pytest.raises(NothingToPrune, match="fc cannot be gated"):
        Taylor(loss="ce")(step_of(toys, Past().eval(), groups=[group]))


def test_a_linear_layer_reads_the_last_axis_of_an_image_too(toys):
    class Nets(nn.Module):
        def __init__(self, last):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.conv, self.fc = last, nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x)
            if self.last:  # (N, H, W, C), as in Swin and ConvNeXt
                return self.fc(x.permute(0, 2, 3, 1)).mean((1, 2))
            return self.fc(x.flatten(2).mT).mean(1)

    channels = torch.arange(4)
    group = ChannelGroup("conv", 4, (Member("fc", "in", channels, channels),))
    images, tokens = (
        Taylor(loss="ce")(step_of(toys, Nets(last).eval(), groups=[group]))[0]
        for last in (True, False)
    )
    assert tokens.min() > 0
    torch.testing.assert_close(images, tokens)


def test_a_head_that_training_alone_runs_adds_nothing(toys):
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x).mean((2, 3))
            return (self.fc(x), self.head(x)) if self.training else self.fc(x)

    channels = torch.arange(4)
    fc, head = (Member(name, "in", channels, channels) for name in ("fc", "head"))
    model = Headed().eval()
    alone, both = (
        Taylor(loss="ce")(step_of(toys, model, groups=[ChannelGroup("conv", 4, members)]))[0]
        for members in ((fc,), (fc, head))
    )
    assert alone.min() > 0
    assert torch.equal(alone, both)


def test_exact_kl_is_zero_where_student_and_teacher_are_one_and_kl_is_not(toys):
    model = toys.two_bn()
    step = step_of(toys, model)
    exact = torch.cat(Taylor(loss="exact_kl")(step))
    sampled = torch.cat(Taylor(loss="kl")(step))
    assert exact.max() < 1e-12
    assert sampled.min() >= 0
    assert sampled.max() > 1e-6


def test_exact_kl_equals_gates_on_the_divergence(toys):
    model, teacher, tau = toys.two_bn(), toys.residual(), 2.0

    def divergence(logits, images, labels):
        p = F.softmax(teacher(images) / tau, dim=1).detach()
        log_q = F.log_softmax(logits / tau, dim=1)
        return (p * (p.log() - log_q)).sum(1).mean()

    step = step_of(toys, model, teacher)
    scores = by_name(step, Taylor(loss="exact_kl", temperature=tau)(step))
    expected = explicit(model, one_by_one(two_batches(toys)), ["bn2"], divergence)
    torch.testing.assert_close(scores["conv2"], expected, rtol=1e-4, atol=1e-10)


def test_kl_draws_labels_from_the_teachers_softmax(toys):
    # A teacher that is certain of the labels makes the draw certain: kl is then ce at τ.
    class Certain(nn.Module):
        def forward(self, x):
            rows = [labels for images, labels in two_batches(toys) if len(images) == len(x)]
            return 1e4 * F.one_hot(rows[0], 3).float()

    model, tau = toys.two_bn(), 2.0
    step = step_of(toys, model, Certain())
    scores = by_name(step, Taylor(loss="kl", temperature=tau)(step))
    expected = explicit(
        model, one_by_one(two_batches(toys)), ["bn1"], lambda z, x, y: F.cross_entropy(z / tau, y)
    )
    torch.testing.assert_close(scores["conv1"], expected, rtol=1e-4, atol=1e-10)


def test_kl_is_a_function_of_the_steps_generator(toys):
    model = toys.two_bn()
    runs = [torch.cat(Taylor()(step_of(toys, model, seed=seed))) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_kl_averages_to_the_curvature(toys):
    # One image: the expected square of the drawn labels' gradient is Σ_k p_k (∂(-log p_k)/∂g)².
    model, tau = toys.two_bn(), 3.0
    image = toys.card().normalise(toys.images(1).images)
    with gated(model, ["bn1"]) as gates:
        log_p = F.log_softmax(model(image) / tau, dim=1)[0]
        rows = [
            torch.autograd.grad(-log_p[k], gates["bn1"], retain_graph=True)[0] for k in range(3)
        ]
    fisher = sum(log_p[k].exp() * rows[k].square() for k in range(3)).detach()
    step = step_of(toys, model, batches=[(image, torch.tensor([0]))] * 600)
    score = by_name(step, Taylor(temperature=tau)(step))["conv1"]
    torch.testing.assert_close(score, fisher, rtol=0.15, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_gradients_and_modes_are_restored(toys, fails):
    model = toys.two_bn()
    model.bn1.train()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    batches = two_batches(toys)
    if fails:
        batches.append((torch.zeros(1, 99, 8, 8), torch.tensor([0])))
    step = step_of(toys, model, batches=batches)
    before = toys.state(model)
    with pytest.raises(RuntimeError, match="channels") if fails else contextlib.nullcontext():
        Taylor(loss="ce")(step)
    toys.assert_same_state(model, before)
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert model.fc.weight.grad is None


def test_gradients_are_restored_when_a_group_has_nothing_to_gate(toys):
    model = toys.two_bn()
    maker = Member("conv1", "out", torch.arange(4), torch.arange(4))
    step = step_of(toys, model, groups=[ChannelGroup("odd", 4, (maker,))])
    before = toys.state(model)
    with pytest.raises(NothingToPrune, match="odd"):
        Taylor(loss="ce")(step)
    toys.assert_same_state(model, before)


def test_frozen_weights_count_too(toys):
    # A teacher fine-tuned with frozen BatchNorm is as easy to rank as any other.
    model = toys.two_bn()
    step = step_of(toys, model)
    free = by_name(step, Taylor(loss="ce")(step))["conv1"]
    model.bn1.weight.requires_grad_(False)
    step = step_of(toys, model)
    torch.testing.assert_close(by_name(step, Taylor(loss="ce")(step))["conv1"], free)
    assert not model.bn1.weight.requires_grad


def test_gate_gradients_by_hand():
    # Two layers of two channels, of which the second's are dealt to group channels 1 and 0.
    places = torch.tensor([0, 1])
    members = (Member("a", "in", places, places), Member("b", "in", places, places.flip(0)))
    gradients = {"a": torch.tensor([[1.0, 2]]), "b": torch.tensor([[10.0, 20]])}
    assert gate_gradients(ChannelGroup("g", 2, members), gradients).tolist() == [[21, 12]]


# --- latency_lut ------------------------------------------------------------------------------


def latency(toys, model, chunk=1, size=(3, 8, 8), block=1):
    step = step_of(toys, model, batches=[], chunk=chunk, size=size, block=block)
    return by_name(step, LatencyLUT()(step))


@pytest.mark.parametrize("chunk", [1, 2])
def test_conv_bn_conv(toys, chunk):
    # conv1 3→4, conv2 4→6, fc 6→3. A channel of conv1 is 3 inputs' and 6 outputs' worth:
    # -0.001·(3 + 6); one of conv2: -0.001·(4 + 3). Linear, so a chunk changes nothing.
    saved = latency(toys, toys.two_bn(), chunk)
    assert saved["conv1"].tolist() == pytest.approx([-0.009] * 4)
    assert saved["conv2"].tolist() == pytest.approx([-0.007] * 6)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        # conv1 3→4, conv2 4→4, conv3 4→5, before 12 + 16 + 20 = 48.
        (1, -0.001 * (48 - (9 + 9 + 15))),  # three channels left: 3·3 + 3·3 + 3·5 = 33
        (2, -0.001 * (48 - (6 + 4 + 10)) / 2),  # two left: 3·2 + 2·2 + 2·5 = 20
        (3, -0.001 * (48 - (9 + 9 + 15))),  # what is left is a multiple of three
        (9, 0.0),  # nothing may go: a multiple of nine is not left
    ],
)
def test_residual_group(toys, chunk, expected):
    saved = latency(toys, toys.residual(), chunk)
    (group,) = [score for score in saved.values() if len(score) == 4]
    assert group.tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_group_is_judged_by_the_end_of_its_block(toys, chunk):
    # In blocks of 4: conv1 3→4 is 4·4, conv2 4→6 4·8, fc 6→3 8·4. Nothing is saved of conv1, which
    # has one block; of conv2's 6 channels the first two save a block, 4·4 + 4·4, and more do not.
    # Two go first in lots of four, too: four are left.
    saved = latency(toys, toys.two_bn(), chunk, block=4)
    assert saved["conv1"].tolist() == pytest.approx([0.0] * 4)
    assert saved["conv2"].tolist() == pytest.approx([-0.032 / 2] * 6)


def test_no_saving_is_promised_beyond_what_may_go(toys):
    # Of conv2's 6 channels one may go, which does not empty a block of 4.
    groups = ChannelGraph(toys.two_bn(), (3, 8, 8)).groups()[0]
    step = step_of(toys, toys.two_bn(), batches=[], groups=groups, block=4)
    step = dataclasses.replace(step, chunks=[[1] for _ in groups])
    assert by_name(step, LatencyLUT()(step))["conv2"].tolist() == pytest.approx([0.0] * 6)


def test_one_channel_saves_nothing(toys):
    groups = [ChannelGroup("conv1", 1, ())]
    step = step_of(toys, toys.two_bn(), batches=[], groups=groups, chunk=2, block=4)
    assert by_name(step, LatencyLUT()(step))["conv1"].tolist() == [0.0]


def test_depthwise(toys):
    # conv1 3→4, depthwise 4, pointwise 4→6: one channel less saves 3, 16-9 = 7 and 6.
    saved = latency(toys, toys.depthwise())
    (group,) = [score for score in saved.values() if len(score) == 4]
    assert group.tolist() == pytest.approx([-0.016] * 4)


def test_flattened_channels_are_several_inputs(toys):
    # 4×4 images, stride 2: each of conv1's 4 channels is 2·2 inputs of fc1 (16→5):
    # 3 + 4·5 = 23.
    saved = latency(toys, toys.flattened(), size=(3, 4, 4))
    assert saved["conv1"].tolist() == pytest.approx([-0.023] * 4)


def test_concatenation(toys):
    # left 3→4 and right 3→5 into merge 9→6: a channel of either saves 3 + 6.
    saved = latency(toys, toys.concatenated())
    assert saved["left"].tolist() == pytest.approx([-0.009] * 4)
    assert saved["right"].tolist() == pytest.approx([-0.009] * 5)


def test_without():
    conv = LayerShape("conv", 8, 16, feature_map=(4, 4))
    assert (conv.without("out", 3).c_in, conv.without("out", 3).c_out) == (8, 13)
    assert (conv.without("in", 3).c_in, conv.without("in", 3).c_out) == (5, 16)
    assert conv.without("in", 99).c_in == 1
    depthwise = LayerShape("conv", 8, 8, groups=8, feature_map=(4, 4))
    both = depthwise.without("out", 3).without("in", 3)
    assert (both.c_in, both.c_out, both.groups) == (5, 5, 5)
    assert depthwise.without("in", 3).without("out", 3) == both


# --- weights alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_norm_of_filters(toys, p):
    model = toys.two_bn()
    step = step_of(toys, model, batches=[])
    scores = by_name(step, Magnitude(norm=p)(step))
    expected = model.conv1.weight.detach().abs().pow(p).sum((1, 2, 3)).pow(1 / p)
    torch.testing.assert_close(scores["conv1"], expected)


@pytest.mark.parametrize(
    ("reduction", "reduce"),
    [("sum", lambda a, b: a + b), ("mean", lambda a, b: (a + b) / 2), ("max", torch.maximum)],
)
def test_coupled_layers_are_reduced(toys, reduction, reduce):
    model = toys.residual()
    step = step_of(toys, model, batches=[])
    (score,) = [s for s in Magnitude(reduction=reduction)(step) if len(s) == 4]
    norms = [c.weight.detach().abs().sum((1, 2, 3)) for c in (model.conv1, model.conv2)]
    torch.testing.assert_close(score, reduce(*norms))


def test_bn_scale_is_the_size_of_gamma(toys):
    model = toys.residual()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1.0, -2, 3, 0]))
        model.bn2.weight.copy_(torch.tensor([-0.5, 0.5, 0, 0]))
    step = step_of(toys, model, batches=[])
    (score,) = [s for s in BNScale()(step) if len(s) == 4]
    assert score.tolist() == [1.5, 2.5, 3, 0]


def test_bn_scale_refuses_groups_without_batch_norm(toys):
    groups = step_of(toys, toys.depthwise(), batches=[]).groups
    named = (
        r"no BatchNorm with a scale in the channel groups pointwise: use taylor, or leave such "
        r"groups alone, .* \{layers: pointwise, max_ratio: 0\}"
    )
    with pytest.raises(NothingToPrune, match=named):
        BNScale().check(toys.depthwise(), groups)
    BNScale().check(toys.depthwise(), [group for group in groups if group.name != "pointwise"])


def test_a_group_that_no_layer_reads_is_refused(toys):
    model = toys.two_bn()
    read, unread = step_of(toys, model, batches=[]).groups
    Taylor().check(model, [read, unread])
    makers = tuple(member for member in unread.members if member.axis == "out")
    with pytest.raises(NothingToPrune, match=r"no layer that reads channels in .* conv2: leave"):
        Taylor().check(model, [read, dataclasses.replace(unread, members=makers)])


@pytest.mark.parametrize("criterion", [Magnitude(), FPGM()])
def test_what_a_criterion_reads_is_looked_for_in_every_group(toys, criterion):
    model = toys.two_bn()
    groups = step_of(toys, model, batches=[]).groups
    criterion.check(model, groups)
    model.conv2 = nn.ConvTranspose2d(4, 6, 3)
    model.bn2 = nn.Identity()
    with pytest.raises(NothingToPrune, match="in the channel groups conv2: "):
        criterion.check(model, groups)


def test_fpgm_scores_the_filter_in_the_middle_lowest(toys):
    model = toys.two_bn()
    with torch.no_grad():
        for number, value in enumerate((0.0, 1, 2, 10)):
            model.conv1.weight[number] = value
    step = step_of(toys, model, batches=[])
    score = by_name(step, FPGM()(step))["conv1"]
    # Filters of 27 equal weights lie √27·|difference| apart: 0: 1+2+10, 1: 1+1+9, 2: 2+1+8, ...
    torch.testing.assert_close(score, 27**0.5 * torch.tensor([13.0, 11, 11, 27]))


def test_random_is_a_function_of_the_steps_generator(toys):
    runs = [torch.cat(Random()(step_of(toys, toys.two_bn(), seed=s))) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].min() >= 0
    assert runs[0].max() < 1


def test_taylor_averages_over_steps(toys):
    model = toys.two_bn()
    step = step_of(toys, model)
    plain = Taylor(loss="ce")(step)
    earlier = [torch.full_like(score, 5.0) for score in plain]
    averaged = Taylor(loss="ce", ema=0.75)(dataclasses.replace(step, earlier=earlier))
    for new, score in zip(averaged, plain, strict=True):
        torch.testing.assert_close(new, 0.75 * 5 + 0.25 * score)
    for new, score in zip(Taylor(loss="ce", ema=0.75)(step), plain, strict=True):
        torch.testing.assert_close(new, score)
