"""Channel groups, the choice of what goes, and cuts that can be repeated elsewhere."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.errors import ArtifactError, DreamkitError, TeacherMismatch
from dreamkit.latency.layer_shapes import layer_shapes
from dreamkit.plugin.testing import check_selection
from dreamkit.pruning import knapsack
from dreamkit.pruning.cost_model import CostModel
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.knapsack import choose_knapsack
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import (
    Greedy,
    LayerLimits,
    Limits,
    choose,
    choose_by_cost,
    removable,
)
from dreamkit.types import ChannelGroup, Member

SIZE = (3, 8, 8)


def groups_of(model, size=SIZE):
    return {group.name: group for group in ChannelGraph(model, size).groups()[0]}


def members(group):
    return {(member.layer, member.axis) for member in group.members}


def prune(model, removals, pruning_record=None, size=SIZE):
    """Remove channels by group name; return the record."""
    graph = ChannelGraph(model, size, pruning_record)
    known = {group.name for group in graph.groups()[0]}
    graph.remove({name: gone for name, gone in removals.items() if name in known})
    return graph.pruning_record


def images(count=2, size=SIZE):
    total = count * size[0] * size[1] * size[2]
    return torch.sin(torch.arange(total) * 0.37).view(count, *size)


# --- groups -----------------------------------------------------------------------------------


def test_groups_of_a_chain(toys):
    groups = groups_of(toys.two_bn())
    assert {name: group.channels for name, group in groups.items()} == {"conv1": 4, "conv2": 6}
    assert members(groups["conv1"]) == {("conv1", "out"), ("bn1", "out"), ("conv2", "in")}
    assert members(groups["conv2"]) == {("conv2", "out"), ("bn2", "out"), ("fc", "in")}
    for member in groups["conv1"].members:
        assert member.index.tolist() == member.channel.tolist() == [0, 1, 2, 3]


def test_residual_sums_couple_layers(toys):
    groups = groups_of(toys.residual())
    assert sorted(group.channels for group in groups.values()) == [4, 5]
    (coupled,) = [group for group in groups.values() if group.channels == 4]
    assert members(coupled) == {
        ("conv1", "out"),
        ("bn1", "out"),
        ("conv2", "in"),
        ("conv2", "out"),
        ("bn2", "out"),
        ("conv3", "in"),
    }


def test_flattened_channels(toys):
    groups = groups_of(toys.flattened(), (3, 4, 4))
    assert {name: group.channels for name, group in groups.items()} == {"conv1": 4, "fc1": 5}
    (fc,) = [m for m in groups["conv1"].members if m.layer == "fc1"]
    # Channel c is inputs 4c to 4c+3 of fc1.
    pairs = sorted(zip(fc.index.tolist(), fc.channel.tolist(), strict=True))
    assert pairs == [(i, i // 4) for i in range(16)]


def test_concatenated_channels(toys):
    groups = groups_of(toys.concatenated())
    assert {n: g.channels for n, g in groups.items()} == {"left": 4, "right": 5, "merge": 6}
    for name, offset in (("left", 0), ("right", 4)):
        (merge,) = [m for m in groups[name].members if m.layer == "merge"]
        pairs = set(zip(merge.index.tolist(), merge.channel.tolist(), strict=True))
        assert pairs == {(offset + i, i) for i in range(groups[name].channels)}


def test_depthwise_layers_follow_their_channels(toys):
    (group,) = [g for g in groups_of(toys.depthwise()).values() if g.channels == 4]
    assert {"conv1", "bn1", "depthwise", "bn2", "pointwise"} == {m.layer for m in group.members}


@pytest.mark.parametrize(("toy", "classifier"), [("two_bn", "fc"), ("conv_head", "head")])
def test_the_classifier_is_left_alone(toys, toy, classifier):
    model = getattr(toys, toy)()
    found, skipped = ChannelGraph(model, SIZE).groups()
    assert classifier not in {group.name for group in found}
    assert (classifier, "out") not in {pair for group in found for pair in members(group)}
    assert (classifier, "makes the model's outputs") in {(s.group, s.reason) for s in skipped}


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.grouped(self.stem(x)).mean((2, 3)))


class Shuffled(nn.Module):
    """Half of the channels pass by, and halves are dealt out in turn, as in ShuffleNetV2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class Partial(nn.Module):
    """The first channels of a block's output meet its input, as in ReXNet."""

    def __init__(self, attribute=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 3)
        if attribute:
            self.width = 4

    def forward(self, x):
        x = self.stem(x)
        width = getattr(self, "width", 4)
        y = self.conv(x)
        y = torch.cat([y[:, :width] + x, y[:, width:]], 1)
        return self.fc(y.mean((2, 3)))


class Scaled(nn.Module):
    """A scale outside any layer, and layers with channels last, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        x = x + (y * self.scale).permute(0, 3, 1, 2)
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """One layer, called on the outputs of two others."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.both = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        met = self.both(self.left(x)) * self.both(input=self.right(x))
        return self.fc(met.mean((2, 3)))


class Windowed(nn.Module):
    """Halves of four channels, and a window of four pixels that has nothing to do with them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.window = 4
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, 1)
        return self.fc(F.max_pool2d(left * right, self.window).mean((2, 3)))


class WindowedBesideFixed(Windowed):
    """The same, with channels elsewhere whose number stands in the code."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Conv2d(3, 6, 1)
        self.more = nn.Linear(6, 3)

    def forward(self, x):
        fixed = self.fixed(x).reshape(len(x), 6 * 64).view(len(x), 6, 64)
        return super().forward(x) + self.more(fixed.mean(2))


class Stacked(nn.Module):
    """Two branches, stacked and added up, meet a third."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.stack([self.left(x), self.right(x)]).sum(0)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "channels", "coupled"),
    [
        # Of 4 inputs in 2 groups the same place of both goes; so of the 8 outputs.
        (Grouped, {"stem": 2, "grouped": 4}, {("stem", 0): [0, 2], ("grouped", 1): [1, 5]}),
        # Both halves lose the same places.
        (Shuffled, {"stem": 4}, {("stem", 1): [1, 5]}),
        (Partial, {"stem": 4, "conv": 2}, {("stem", 3): [3]}),
        (Scaled, {"stem": 4, "up": 6}, {("stem", 2): [2]}),
        (Twice, {"left": 4, "both": 5}, {("left", 1): [1]}),
        (Windowed, {"stem": 4}, {("stem", 1): [1, 5]}),
        (WindowedBesideFixed, {"stem": 4}, {("stem", 1): [1, 5]}),
        (Stacked, {"stem": 4}, {("stem", 3): [3]}),
    ],
)
def test_networks_that_move_their_channels_about(network, channels, coupled):
    model = fill_network(network())
    groups = groups_of(model)
    assert {name: group.channels for name, group in groups.items()} == channels
    for (name, channel), places in coupled.items():
        (own,) = [m for m in groups[name].members if (m.layer, m.axis) == (name, "out")]
        assert own.index[own.channel == channel].tolist() == places
    whole, fresh = fill_network(network()), fill_network(network())
    pruning_record = prune(model, {name: [0] for name in channels})
    assert model(images()).shape == (2, 3)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    PruningRecord.from_json(json.loads(json.dumps(pruning_record.to_json()))).rebuild(fresh)
    assert torch.equal(fresh(images()), model(images()))
    assert getattr(model, "window", 4) == 4, "it equals a number of channels by chance"


def test_what_is_left_of_a_shuffle_computes_what_it_did():
    # Without the branch's and the stem's first pair; the fully connected layer ignored them.
    model, whole = fill_network(Shuffled()), fill_network(Shuffled())
    with torch.no_grad():
        for network in (model, whole):
            network.branch.weight[:, 0] = 0
            for channel in (0, 1):  # where the first of either half end up
                network.fc.weight[:, channel] = 0
    prune(model, {"stem": [0], "branch": [0]})
    torch.testing.assert_close(model(images()), whole(images()), rtol=1e-5, atol=1e-6)


def fill_network(model):
    """Give a network weights that depend on nothing else."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.sin(torch.arange(parameter.numel()) * 0.7 + number)
            parameter.copy_(values.view(parameter.shape))
    return model.eval()


class Fixed(nn.Module):
    """The number of channels stands in the code."""

    def __init__(self, how):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.inner = nn.Conv2d(4, 6, 1)
        self.narrow = nn.Conv2d(4, 3, 1)
        self.fc = nn.Linear(6, 3)
        self.how = how
        self.stride = 2

    def forward(self, x):
        x = self.stem(x)
        if self.how == "view":
            x = x.reshape(len(x), 4, 64).view(len(x), 4, 8, 8)
        elif self.how == "slice":
            x = torch.cat([x[:, :2] * 2, x[:, 2:]], 1)  # the stride is 2 by chance
        elif self.how == "norm":
            x = F.layer_norm(x, (4, 8, 8))
        elif self.how == "half":
            half = x.shape[1] // 2
            x = torch.cat([x[:, :half] * 2, x[:, half:]], 1)
        elif self.how == "every other":
            x = torch.cat([x[:, ::2], x[:, 1::2]], 1)
        elif self.how == "picked":
            x = x[:, torch.arange(x.shape[1]).flip(0)]
        elif self.how == "zeros":
            x = x + torch.cat([torch.zeros(len(x), 1, 8, 8), self.narrow(x)], 1)
        elif self.how == "matrix":
            flat = x.flatten(2)
            x = x + (flat @ flat.transpose(1, 2)).mean()
        return self.fc(self.inner(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("view", "the model's code fixes how many there are"),
        ("slice", "the model's code fixes how many there are"),
        ("norm", "they go through aten.native_layer_norm"),
        ("half", "the code cuts them at a fixed number"),
        ("every other", "the code takes every few of them"),
        ("picked", "they go through aten.index"),
        ("zeros", "some of them meet constants where others meet channels"),
        ("matrix", "they go through aten.bmm"),
    ],
)
def test_channels_that_code_counts_on_are_left_alone(how, reason):
    model = fill_network(Fixed(how))
    found, skipped = ChannelGraph(model, SIZE).groups()
    assert "inner" in {group.name for group in found}
    reasons = {s.reason for s in skipped if s.group.startswith("stem")}
    assert reason in reasons, reasons
    prune(model, {group.name: [0] for group in found})
    assert model(images()).shape == (2, 3)


def test_channels_beside_padded_zeros_are_left_alone_and_padded_pixels_are_none():
    class Padded(nn.Module):
        """The second sum adds channel c of the first convolution to channel c + 1."""

        def __init__(self, pad):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.inner = nn.Conv2d(4, 5, 1)
            self.outer = nn.Conv2d(5, 4 + sum(pad[4:]), 1)
            self.fc = nn.Linear(4 + sum(pad[4:]), 3)
            self.pad = pad

        def forward(self, x):
            x = self.stem(x)
            narrow = x[:, :, 1:-1, 1:-1] if self.pad[0] else x
            x = self.outer(self.inner(x)) + F.pad(narrow, self.pad)
            return self.fc(x.mean((2, 3)))

    found, skipped = ChannelGraph(Padded((0, 0, 0, 0, 1, 1)), SIZE).groups()
    assert [group.name for group in found] == ["inner"]
    reasons = {s.group: s.reason for s in skipped}
    assert reasons["stem"] == "its channels meet others beside padded zeros, which shift them"
    found, _ = ChannelGraph(Padded((1, 1, 1, 1)), SIZE).groups()
    assert sorted(group.channels for group in found) == [4, 5]


def test_tracing_leaves_the_model_as_it_was(toys):
    model = toys.two_bn()
    model.bn1.train()
    model.conv1.weight.requires_grad_(False)
    before = toys.state(model)
    ChannelGraph(model, SIZE).groups()
    toys.assert_same_state(model, before)


# --- cutting ------------------------------------------------------------------------------------


def test_cut_values_equal_slicing_by_hand(toys):
    whole, cut = toys.two_bn(), toys.two_bn()
    prune(cut, {"conv1": [1, 2], "conv2": [0]})
    first, second = [0, 3], [1, 2, 3, 4, 5]
    w, c = whole.state_dict(), cut.state_dict()
    assert torch.equal(c["conv1.weight"], w["conv1.weight"][first])
    assert torch.equal(c["conv2.weight"], w["conv2.weight"][second][:, first])
    assert torch.equal(c["fc.weight"], w["fc.weight"][:, second])
    assert torch.equal(c["fc.bias"], w["fc.bias"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(c[f"bn1.{name}"], w[f"bn1.{name}"][first])
        assert torch.equal(c[f"bn2.{name}"], w[f"bn2.{name}"][second])
    assert (cut.conv1.out_channels, cut.conv2.in_channels, cut.conv2.out_channels) == (2, 2, 5)
    assert (cut.bn1.num_features, cut.fc.in_features) == (2, 5)
    assert {p.dtype for p in cut.parameters()} == {torch.float32}


def test_removed_channels_are_as_if_their_gates_were_shut(toys):
    # relu(BN) set to zero by γ = β = 0 leaves the later layers what removal leaves them.
    whole, cut = toys.two_bn(), toys.two_bn()
    prune(cut, {"conv1": [1]})
    with torch.no_grad():
        whole.bn1.weight[1] = 0
        whole.bn1.bias[1] = 0
    torch.testing.assert_close(cut(images()), whole(images()), rtol=1e-5, atol=1e-6)


REMOVALS = {
    "two_bn": {"conv1": [0, 3], "conv2": [2]},
    "residual": {"conv1": [1], "conv2": [1], "conv3": [4]},
    "plain": {"conv1": [2], "conv2": [0, 1]},
    "depthwise": {"conv1": [0], "depthwise": [0], "pointwise": [5]},
    "concatenated": {"left": [3], "right": [0, 2], "merge": [1]},
    "conv_head": {"conv1": [2]},
    "flattened": {"conv1": [1], "fc1": [0]},
}


@pytest.mark.parametrize("toy", REMOVALS)
def test_rebuilt_from_json_the_outputs_are_identical(toys, toy):
    size = (3, 4, 4) if toy == "flattened" else SIZE
    cut, fresh = getattr(toys, toy)(), getattr(toys, toy)()
    before = sum(p.numel() for p in cut.parameters())
    pruning_record = prune(cut, REMOVALS[toy], size=size)
    assert sum(p.numel() for p in cut.parameters()) < before
    with torch.no_grad():  # the weights move on after pruning, as in recovery
        for parameter in cut.parameters():
            parameter.mul_(1.1)
    PruningRecord.from_json(json.loads(json.dumps(pruning_record.to_json()))).rebuild(fresh)
    fresh.load_state_dict(cut.state_dict())
    x = images(size=size)
    assert torch.equal(fresh(x), cut(x))
    assert str(fresh) == str(cut), "sizes in attributes are restored too"


def test_two_rounds_compose(toys):
    whole, cut, fresh = toys.two_bn(), toys.two_bn(), toys.two_bn()
    pruning_record = prune(cut, {"conv1": [1], "conv2": [0, 5]})
    # conv1 keeps 0 2 3, of which the second round drops the middle one: 0 3 are left.
    # conv2 keeps 1 2 3 4, of which the second round drops the first: 2 3 4 are left.
    prune(cut, {"conv1": [1], "conv2": [0]}, pruning_record)
    assert pruning_record.kept["conv2.weight"] == [[2, 3, 4], [0, 3], None, None]
    expected = whole.conv2.weight[[2, 3, 4]][:, [0, 3]]
    assert torch.equal(cut.conv2.weight, expected)
    PruningRecord.from_json(json.loads(json.dumps(pruning_record.to_json()))).rebuild(fresh)
    assert torch.equal(fresh(images()), cut(images()))


def test_pruning_keeps_which_weights_are_frozen(toys):
    model = toys.two_bn()
    model.conv1.weight.requires_grad_(False)
    prune(model, {"conv1": [0]})
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad


def test_pruning_on_a_model_that_has_gradients(toys):
    model = toys.two_bn()
    model(images()).sum().backward()  # .grad fields are filled, as after a recovery epoch
    prune(model, {"conv1": [0]})
    model.zero_grad()
    model(images()).sum().backward()
    assert model.conv1.weight.grad.shape == (3, 3, 3, 3)


def test_removing_nothing_records_nothing(toys):
    model = toys.two_bn()
    before = toys.state(model)
    pruning_record = prune(model, {})
    assert pruning_record == PruningRecord()
    assert not any(pruning_record.to_json().values())
    toys.assert_same_state(model, before)


def test_two_records_make_one(toys):
    cut, fresh = toys.two_bn(), toys.two_bn()
    first = prune(cut, {"conv1": [1], "conv2": [0, 5]})
    second = prune(cut, {"conv1": [1]})
    both = second.after(first)
    assert both.kept["conv1.weight"] == [[0, 3], None, None, None]
    assert both.kept["conv2.weight"] == [[1, 2, 3, 4], [0, 3], None, None]
    both.rebuild(fresh)
    fresh.load_state_dict(cut.state_dict())
    assert torch.equal(fresh(images()), cut(images()))
    assert str(fresh) == str(cut)


@pytest.mark.parametrize("wrong", ["conv_head", "flattened"])
def test_rebuild_on_another_architecture_is_refused(toys, wrong):
    pruning_record = prune(toys.two_bn(), {"conv2": [0]})
    with pytest.raises(ArtifactError, match=r"no tensor .conv2\.weight."):
        pruning_record.rebuild(getattr(toys, wrong)())


def test_rebuild_on_a_smaller_model_is_refused(toys):
    pruning_record = prune(toys.residual(), {"conv3": [0]})  # keeps 1 to 4 of conv3's 5
    small = nn.Module()
    small.conv3 = nn.Conv2d(4, 3, 3)
    small.bn3 = nn.BatchNorm2d(3)
    small.fc = nn.Linear(3, 3)
    with pytest.raises(ArtifactError, match="do not exist"):
        pruning_record.rebuild(small)


def test_rebuild_with_a_size_the_module_does_not_have_is_refused(toys):
    pruning_record = PruningRecord({}, {"conv1": {"no_such_size": 3}})
    with pytest.raises(ArtifactError, match="no_such_size"):
        pruning_record.rebuild(toys.two_bn())


class Normed(nn.Module):
    """conv1 → a normalisation layer → relu → fc."""

    def __init__(self, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = norm
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize(
    "norm",
    [BatchNormAct2d, nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False), FrozenBatchNorm2d],
    ids=["timm", "torch", "not affine", "frozen"],
)
def test_every_kind_of_batch_norm_is_cut_or_the_group_is_skipped(norm):
    model = Normed(norm(4)).eval()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.tensor([0.0, 1, 2, 3]))
    found, skipped = ChannelGraph(model, SIZE).groups()
    if not found:
        assert skipped[0].group == "conv1"
        return
    prune(model, {"conv1": [0, 2]})
    assert model.norm.running_mean.tolist() == [1, 3]
    assert model(images()).shape == (2, 3)


# --- selection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "original", "now", "expected"),
    [
        (Limits(), 16, 16, [1] * 14),  # a tenth of 16 is 1.6: 14 of 16 may go, 2 stay
        (Limits(), 10, 10, [1] * 8),  # nine of ten may go, but never fewer than 2 are left
        (Limits(chunk=4), 16, 16, [4, 4, 4]),  # 14 spare, in fours
        (Limits(chunk=4), 16, 5, [1]),  # what is left is a multiple of four
        (Limits(chunk=16), 30, 30, [14]),
        (Limits(chunk=16), 10, 10, []),
        (Limits(max_ratio=0.5), 16, 12, [1] * 4),  # floor 8
        (Limits(max_ratio=0.5), 16, 8, []),
        (Limits(max_ratio=0.5), 16, 6, []),  # below the floor already
        (Limits(min_channels=7), 16, 16, [1] * 9),
        (Limits(max_ratio=0.29), 100, 100, [1] * 29),  # 0.29·100 is 28.999… in floating point
        (Limits(max_ratio=1, min_channels=1), 8, 8, [1] * 7),
        (Limits(max_ratio=1, min_channels=1, chunk=8), 8, 8, []),
    ],
)
def test_chunks(limits, original, now, expected):
    assert limits.chunks(group("a", now), original) == expected


@pytest.mark.parametrize(
    ("limits", "original", "expected"),
    [
        (Limits(), 64, [16, 16, 16]),
        (Limits(), 72, [8, 16, 16, 16]),
        (Limits(), 63, [7] + [8] * 6),  # fewer than four times 16
        (Limits(), 24, [4] * 5),
        (Limits(), 6, [1] * 4),
        (Limits(chunk=2), 8, [2, 2, 2]),  # what is asked for counts
    ],
)
def test_chunks_on_a_target_that_likes_multiples_of_16(limits, original, expected):
    assert limits.chunks(group("a", original), original, 16) == expected
    assert limits.chunks(group("a", original), original)[0] == (2 if limits.chunk == 2 else 1)


def test_limits_of_some_layers():
    def of(layer):
        every = torch.arange(8)
        made, read = Member(layer, "out", every, every), Member("reader", "in", every, every)
        return ChannelGroup("root", 8, (made, read))

    exceptions = (
        LayerLimits("layer4.*", max_ratio=0),
        LayerLimits("layer?.*", min_channels=6),
        LayerLimits("reader", max_ratio=0),
    )
    limits = Limits(exceptions=exceptions)
    assert limits.chunks(of("layer4.conv"), 8) == []
    assert limits.chunks(of("layer3.conv"), 8) == [1, 1]
    assert limits.chunks(of("stem"), 8) == [1] * 6, "a layer that only reads them does not count"


@pytest.mark.parametrize(
    ("exception", "expected"),
    [
        (LayerLimits("made", max_ratio=0.75), [1] * 3),  # at least 5 stay, as everywhere
        (LayerLimits("made", min_channels=1), [1] * 4),  # at the most half goes, as everywhere
        (LayerLimits("made", max_ratio=0.75, min_channels=1), [1] * 6),
        (LayerLimits("made"), [1] * 3),
    ],
)
def test_what_an_exception_leaves_out_is_as_everywhere(exception, expected):
    every = torch.arange(8)
    made = ChannelGroup("made", 8, (Member("made", "out", every, every),))
    limits = Limits(max_ratio=0.5, min_channels=5, exceptions=(exception,))
    assert limits.chunks(made, 8) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block.conv4", r"fits 'block\.conv4'; did you mean 'block\.conv\d'"),
        ("bloc", r"did you mean 'block\.\*'"),
        ("block", r"did you mean 'block\.\*'"),
        ("nothing.*", r"\(layers: stem, block\.conv1, block\.bn1, .* and 1 more\)"),
    ],
)
def test_an_exception_that_means_no_layer_is_refused(toys, layers, message):
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 1))
    model.add_module("block", toys.residual())
    model.add_module("scores", nn.Linear(3, 3))
    makers = ChannelGraph(model, SIZE).makers
    limits = Limits(exceptions=(LayerLimits("scores", max_ratio=0), LayerLimits(layers)))
    with pytest.raises(TeacherMismatch, match=message) as refused:
        limits.check(makers)  # of a classifier, that is left alone in any case, nothing is said
    assert refused.value.path == ("exceptions", 1, "layers")


def group(name, channels):
    return ChannelGroup(name, channels, ())


A, B = group("a", 4), group("b", 4)
SCORES = [torch.tensor([5.0, 1, 3, 2]), torch.tensor([0.5, 9, 2.5, 8])]
FREE = Limits(max_ratio=1, min_channels=1)
FOUR = {"a": 4, "b": 4}


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (1, {"b": [0]}),  # 0.5
        (3, {"b": [0], "a": [1, 3]}),  # 0.5, 1, 2
        (5, {"b": [0, 2], "a": [1, 3, 2]}),  # 0.5, 1, 2, 2.5, 3
        (99, {"b": [0, 2, 3], "a": [1, 3, 2]}),  # one of each stays
    ],
)
def test_choose_takes_the_lowest_scores_of_all_groups(channels, expected):
    assert choose(removable([A, B], SCORES, FOUR, FREE), channels) == expected


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        # Chunks of two, by mean: a {1,3} 1.5, b {0,2} 1.5, then none (one must stay).
        (1, {"a": [1, 3]}),  # at least one chunk
        (3, {"a": [1, 3]}),  # a second chunk would make four
        (4, {"a": [1, 3], "b": [0, 2]}),
        (99, {"a": [1, 3], "b": [0, 2]}),
    ],
)
def test_choose_in_chunks(channels, expected):
    limits = Limits(chunk=2, max_ratio=1, min_channels=1)
    assert choose(removable([A, B], SCORES, FOUR, limits), channels) == expected


def test_choose_minds_what_was_removed_before():
    # a had 8 channels, of which half may go: none is spare at 4. b may lose 2 of 4.
    chunks = removable([A, B], SCORES, {"a": 8, "b": 4}, Limits(max_ratio=0.5))
    assert choose(chunks, 99) == {"b": [0, 2]}


def test_choose_nothing_where_the_limits_leave_nothing():
    assert choose(removable([A, B], SCORES, FOUR, Limits(min_channels=4)), 3) == {}


def test_choose_takes_negative_scores_first():
    scores = [torch.tensor([0.0, 1, 2, 3]), torch.tensor([-1.0, -3, -2, 4])]
    assert choose(removable([A, B], scores, FOUR, FREE), 3) == {"b": [1, 2, 0]}


def test_choose_ends_with_the_chunk_that_is_enough():
    seen = []

    def enough(chunk):
        seen.append((chunk.group.name, chunk.channels))
        return len(seen) == 2

    assert choose(removable([A, B], SCORES, FOUR, FREE), 99, enough) == {"b": [0], "a": [1]}
    assert seen == [("b", [0]), ("a", [1])]


# --- the lowest importance per cost -------------------------------------------------------------


def saving(**of_each):
    """Return what channels of groups save, by name: a number a channel, or a list by how many."""

    def saved(group, channels):
        known = of_each[group.name]
        return known[channels] if isinstance(known, list) else channels * known

    return saved


def test_a_channel_that_saves_more_goes_first():
    chunks = removable([A, B], SCORES, FOUR, FREE)
    # a's channels save ten times what b's do: 0.1, 0.2, 0.3 of importance for one, beside 0.5, 2.5.
    found = choose_by_cost(chunks, [(saving(a=10, b=1), 30.0)])
    assert found == {"a": [1, 3, 2]}
    found = choose_by_cost(chunks, [(saving(a=10, b=1), 31.0)])
    assert found == {"a": [1, 3, 2], "b": [0]}


def test_per_cost_in_channels_is_per_channel():
    chunks = removable([A, B], SCORES, FOUR, FREE)
    for number in (1, 3, 5):
        by_cost = choose_by_cost(chunks, [(saving(a=1, b=1), float(number))])
        assert by_cost == choose(chunks, number)


def test_chunks_that_save_only_together_go_together():
    chunks = removable([A, B], SCORES, FOUR, FREE)
    # Of a, one channel saves nothing and two save 9: 3 of importance for 9, a third of b's for one.
    steps = saving(a=[0, 0, 9, 9], b=1)
    assert choose_by_cost(chunks, [(steps, 1.0)]) == {"a": [1, 3]}
    assert choose_by_cost(chunks, [(steps, 10.0)]) == {"a": [1, 3], "b": [0]}


def test_of_several_costs_each_counts_by_what_is_lacking():
    chunks = removable([A, B], [torch.arange(4.0) + 1] * 2, FOUR, FREE)
    flops, params = saving(a=10, b=1), saving(a=1, b=10)
    assert list(choose_by_cost(chunks, [(flops, 30.0), (params, 1.0)])) == ["b", "a"]
    assert list(choose_by_cost(chunks, [(flops, 1.0), (params, 30.0)])) == ["a", "b"]


def test_below_zero_too_the_channel_that_saves_more_goes_first():
    """As a latency criterion's importances are: the more negative, the more is saved."""
    scores = [torch.tensor([-2.0, 5, 6, 7]), torch.tensor([-1.5, -1, 5, 6])]
    chunks = removable([A, B], scores, FOUR, FREE)
    assert choose_by_cost(chunks, [(saving(a=10, b=1), 10.0)]) == {"a": [0]}
    # a's next channel is 7 above the least for 10; b's are 0.5 and 1 above it, for 1 each.
    assert choose_by_cost(chunks, [(saving(a=10, b=1), 11.0)]) == {"a": [0], "b": [0]}
    assert choose_by_cost(chunks, [(saving(a=10, b=1), 12.0)]) == {"a": [0, 1], "b": [0]}


def test_what_does_not_save_enough_goes_all_the_same():
    chunks = removable([A, B], SCORES, FOUR, FREE)
    found = choose_by_cost(chunks, [(saving(a=1, b=1), 99.0)])
    assert {name: len(channels) for name, channels in found.items()} == {"a": 3, "b": 3}
    assert choose_by_cost([[], []], [(saving(a=1, b=1), 1.0)]) == {}


@pytest.mark.parametrize("per", ["channel", "cost"])
def test_greedy_keeps_the_contract(per):
    check_selection(Greedy(per=per))


# --- the knapsack -----------------------------------------------------------------------------


def by_brute_force(chunks, needs):
    """Return the least sum of scores that saves enough, None if nothing does."""
    best = None
    for counts in itertools.product(*(range(len(group) + 1) for group in chunks)):
        taken = [group[:n] for n, group in zip(counts, chunks, strict=True) if n]
        saved = [
            sum(save(c[0].group, sum(len(k.channels) for k in c)) for c in taken)
            for save, _ in needs
        ]
        if all(s >= need - 1e-9 for s, (_, need) in zip(saved, needs, strict=True)):
            score = sum(chunk.score for group in taken for chunk in group)
            best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_solved_exactly(seed):
    draws = torch.Generator().manual_seed(seed)
    groups = [group(name, 6) for name in "abc"]
    scores = [torch.rand(6, generator=draws) for _ in groups]
    limits = Limits(chunk=1 + seed % 2, max_ratio=1, min_channels=1)
    chunks = removable(groups, scores, {"a": 6, "b": 6, "c": 6}, limits)
    # Savings with steps, as measured latencies have them: one chunk in two may save nothing.
    steps = {name: torch.rand(7, generator=draws).cumsum(0).tolist() for name in "abc"}

    def milliseconds(group, channels):
        return steps[group.name][channels // 2 * 2] - steps[group.name][0]

    needs = [(milliseconds, 2.0)]
    if seed % 3 == 0:
        needs.append((lambda group, channels: channels, 9))
    chosen = choose_knapsack(chunks, needs)
    best = by_brute_force(chunks, needs)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        found = sum(
            float(scores["abc".index(name)][channels].sum()) for name, channels in chosen.items()
        )
        assert found == pytest.approx(best, abs=1e-4)
        for name, channels in chosen.items():
            order = torch.argsort(scores["abc".index(name)], stable=True).tolist()
            assert channels == order[: len(channels)], "less important chunks go first"


def test_a_knapsack_takes_no_more_than_it_needs_of_what_is_worse_than_nothing():
    scores = [torch.tensor([-4.0, -1, -3, -2]), torch.tensor([1.0, 2, 3, 4])]
    chunks = removable([A, B], scores, FOUR, FREE)
    assert choose_knapsack(chunks, [(lambda group, channels: channels, 2)]) == {"a": [0, 2]}


def test_a_knapsack_that_cannot_be_filled():
    def number(group, channels):
        return channels

    chunks = removable([A, B], SCORES, FOUR, FREE)
    assert choose_knapsack(chunks, [(number, 7)]) is None
    assert choose_knapsack([[], []], [(number, 1)]) is None
    assert choose_knapsack(chunks, [(number, 6)]) == {"a": [1, 3, 2], "b": [0, 2, 3]}


def test_a_knapsack_that_takes_too_long_is_not_one_that_cannot_be_filled(monkeypatch):
    monkeypatch.setattr(knapsack, "_SECONDS", 0.0)
    draws = torch.Generator().manual_seed(0)
    groups = [group(f"g{number}", 64) for number in range(8)]
    scores = [torch.rand(64, generator=draws) for _ in groups]
    chunks = removable(groups, scores, {g.name: 64 for g in groups}, FREE)
    saved = {g.name: torch.rand(64, generator=draws).cumsum(0).tolist() for g in groups}
    with pytest.raises(DreamkitError, match=r"504 chunks was not solved in 0 s .*limits\.chunk"):
        choose_knapsack(chunks, [(lambda group, channels: saved[group.name][channels], 100.0)])


def test_the_best_of_a_knapsack_is_taken_where_time_runs_out(monkeypatch):
    def stopped(**problem):
        return SimpleNamespace(status=1, x=np.array([1.0, 1, 0, 1, 0, 0]), mip_gap=0.0312)

    monkeypatch.setattr(knapsack, "milp", stopped)
    notes = []
    chunks = removable([A, B], SCORES, FOUR, FREE)
    chosen = choose_knapsack(chunks, [(lambda group, channels: channels, 3)], notes.append)
    assert chosen == {"a": [1, 3], "b": [0]}
    (note,) = notes
    assert "6 chunks was not solved to the end in 60 s: importance up to 3.1% less" in note


# --- costs told from shapes -------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["two_bn", "residual", "depthwise", "conv_head", "plain"])
def test_costs_of_shapes_are_those_of_the_layers(toys, toy):
    model = getattr(toys, toy)()
    shapes = layer_shapes(model, SIZE)
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    assert sum(shape.params for shape in shapes.values()) == weights
    counted = FlopCountAnalysis(model, torch.zeros(1, *SIZE)).by_operator()
    expected = counted["conv"] + counted["linear"]
    assert expected > 0
    assert sum(shape.flops for shape in shapes.values()) == expected


def test_a_cost_model_is_what_pruning_leads_to(toys):
    model, removals = toys.residual(), {"conv1": [0, 2], "conv2": [0, 2], "conv3": [1]}
    cost_model = CostModel(layer_shapes(model, SIZE))
    before = cost_model.total(lambda shape: shape.params)
    saved = []
    for found in ChannelGraph(model, SIZE).groups()[0]:
        if found.name in removals:
            gone = len(removals[found.name])
            saved.append(cost_model.saved(found, gone, lambda shape: shape.params))
            cost_model.take(found, gone)
    prune(model, removals)
    assert cost_model.shapes == layer_shapes(model, SIZE)
    assert cost_model.total(lambda shape: shape.params) == before - sum(saved)
    assert min(saved) > 0


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.Mish, nn.ReLU6, nn.SiLU, nn.Hardsigmoid])
@pytest.mark.parametrize("inplace", [False, True])
def test_activations_leave_channels_where_they_are(activation, inplace):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), activation(inplace=inplace), nn.Flatten(), nn.Linear(8 * 36, 2)
    ).eval()
    groups, skipped = ChannelGraph(model, (3, 8, 8)).groups()
    assert [(group.name, group.channels) for group in groups] == [("0", 8)]
    assert [s.group for s in skipped] == ["3"]
