"""Cross-layer equalisation: ranges alike, outputs as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.quantizers.equalisation import (
    ChannelRanges,
    equalise_activations,
    equalise_weights,
    pairs_of,
)
from dreamkit.quantizers.float_graph import FloatGraph
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.quantizers.watching import values_of
from dreamkit.types import QuantizationStep

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed, reason="needs the extra onnx")


class Chain(nn.Module):
    """Convolutions of all kinds with what may be between, and two things that may not."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2, bias=False)
        self.capped = nn.Conv2d(6, 4, 1)
        self.behind_cap = nn.Conv2d(4, 4, 1)
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.depthwise(F.leaky_relu(self.dense(x), 0.1)))
        x = F.relu6(self.capped(F.max_pool2d(self.grouped(x), 2)))
        x = F.relu(self.behind_cap(x))
        x = x + F.relu(self.read_twice(x))
        return self.second(F.relu(self.first(x.mean((2, 3)))))


PAIRS = [("dense", "depthwise"), ("depthwise", "grouped"), ("grouped", "capped"),
         ("first", "second")]  # fmt: skip


def uneven(toys):
    """Return a chain whose channels have ranges of several powers of two."""
    model = toys.fill(Chain())
    with torch.no_grad():
        for layer in (model.dense, model.depthwise, model.grouped, model.first):
            layer.weight.mul_(
                2.0 ** torch.arange(len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1))
            )
        for layer in (model.depthwise, model.capped, model.second):
            layer.weight.mul_(0.1)
    return model


@pytest.fixture(scope="module")
def exported():
    return {}


@pytest.fixture
def graph(toys, exported):
    if not exported:
        exported["chain"] = as_onnx(uneven(toys), torch.zeros(2, 3, 8, 8), any_batch=True)
    return FloatGraph(exported["chain"])


@pytest.fixture
def images(toys):
    return toys.card().normalise(toys.images(24).images)


def outputs(graph, images):
    return OnnxSession(graph.serialised(), 1, torch.zeros(())).run(images)


def channels_of(graph, pairs, images):
    seen = ChannelRanges(pairs)
    for values in values_of(graph.proto, seen.tensors, images.split(7)):
        seen.see(values)
    return seen.ranges


def test_pairs_are_layers_with_nothing_between_that_minds(graph):
    assert [(pair.first.name, pair.second.name) for pair in pairs_of(graph)] == PAIRS


def test_layers_that_share_weights_are_in_no_pair(graph):
    nodes = {node.name: node for node in graph.proto.graph.node}
    layers = {layer.name: layer for layer in graph.layers}
    nodes[layers["behind_cap"].node].input[1] = "read_twice.weight"
    nodes[layers["capped"].node].input[2] = layers["behind_cap"].bias
    changed = FloatGraph(graph.serialised())
    assert [(p.first.name, p.second.name) for p in pairs_of(changed)] == [*PAIRS[:2], PAIRS[3]]


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_outputs_stay_what_they_were(graph, images, by):
    right, pairs = outputs(graph, images), pairs_of(graph)
    before = graph.constant("dense.weight")
    if by == "weights":
        equalise_weights(graph, pairs)
    else:
        equalise_activations(graph, pairs, channels_of(graph, pairs, images))
    torch.testing.assert_close(outputs(graph, images), right, rtol=1e-4, atol=1e-4)
    assert float((graph.constant("dense.weight") - before).abs().max()) > 1


def test_both_layers_of_a_pair_have_the_same_ranges_in_every_channel(graph):
    equalise_weights(graph, pairs_of(graph))
    dense, depthwise = graph.constant("dense.weight"), graph.constant("depthwise.weight")
    first, second = graph.constant("first.weight"), graph.constant("second.weight")
    torch.testing.assert_close(
        dense.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3)), rtol=0.02, atol=0
    )
    torch.testing.assert_close(first.abs().amax(1), second.abs().amax(0), rtol=0.02, atol=0)


def test_a_pair_by_hand(graph):
    """Ranges of 8 and 2 in one layer, 2 and 8 in the next: s is 2 and 1/2, all become 4."""
    pair = pairs_of(graph)[-1]
    weight, bias = torch.zeros(5, 4), torch.zeros(5)
    weight[0, 1], weight[1, 2], bias[0] = 8.0, -2.0, 6.0
    after = torch.zeros(3, 5)
    after[0, 0], after[2, 1] = 2.0, 8.0
    graph.replace_constant("first.weight", weight)
    graph.replace_constant("first.bias", bias)
    graph.replace_constant("second.weight", after)
    equalise_weights(graph, (pair,))
    assert graph.constant("first.weight")[:2].abs().amax(1).tolist() == [4.0, 4.0]
    assert graph.constant("second.weight").abs().amax(0).tolist() == [4.0, 4.0, 0.0, 0.0, 0.0]
    assert graph.constant("first.bias").tolist() == [3.0, 0.0, 0.0, 0.0, 0.0]


def test_channels_that_filters_of_their_own_read_have_one_range(graph, images):
    pairs = pairs_of(graph)
    before = channels_of(graph, pairs, images)[pairs[0].second.input]
    equalise_activations(graph, pairs, channels_of(graph, pairs, images))
    after = channels_of(graph, pairs, images)[pairs[0].second.input]
    assert float(before.max() / before.min()) > 16
    # One that is smaller than a sixteenth of the largest was taken for that.
    right = (before / before.max() * 16).clamp(max=1)
    torch.testing.assert_close(after / after.max(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
def test_integers_are_nearer_to_float(toys, images, tmp_path, per_channel):
    model = toys.plain()
    uneven = 2.0 ** torch.tensor([0.0, 3.0, -3.0, 5.0])
    with torch.no_grad():
        model.conv1.weight.mul_(uneven.view(-1, 1, 1, 1))
        model.conv1.bias.mul_(uneven)
        model.conv2.weight.div_(uneven.view(1, -1, 1, 1))
    right, errors, notes = model(images).detach(), [], []
    graph = FloatGraph(as_onnx(model, images, any_batch=True))
    step = QuantizationStep(
        model=model,
        batches=lambda: iter(images.split(5)),
        folder=tmp_path,
        note=notes.append,
        advance=lambda share: None,
    )
    for on in (False, True):
        options = OnnxQuantizer(per_channel=per_channel, equalise=on, bias_correction=False)
        made = options.calibrate_graph(graph, step)
        assert made.describe()["equalise"] is on
        errors.append(float((made.session().run(images) - right).square().mean()))
    assert errors[1] < errors[0] / 4
    assert notes == []


def test_without_pairs_it_says_so(toys, tmp_path):
    notes = []
    images = toys.card().normalise(toys.images(6).images)
    step = QuantizationStep(
        model=toys.plain(),
        batches=lambda: iter([images]),
        folder=tmp_path,
        note=notes.append,
        advance=lambda share: None,
    )
    graph = FloatGraph(as_onnx(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), images))
    OnnxQuantizer(equalise=True).calibrate_graph(graph, step)
    assert any("equalise has no effect" in note for note in notes)


def test_the_bias_of_a_dead_filter_does_not_take_all_the_range(tmp_path):
    """Its channel would be 10⁵ times as wide as the others, which share one scale with it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] *= 1e-12
        model[0].bias[1] = 0.1
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = FloatGraph(as_onnx(model, images))
    after = FloatGraph(before.serialised())
    equalise_weights(after, pairs_of(after))
    name = pairs_of(after)[0].second.input
    ((values,), (plain,)) = (
        [v[name] for v in values_of(g.proto, (name,), [images])] for g in (after, before)
    )
    assert values.max() < 10 * plain.max()
