"""Channels that stay tell what those that go told, as far as these follow them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit import distributed
from dreamkit.pruning.compensation import compensate
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.readings import readings
from dreamkit.stages import compensating
from dreamkit.stages.compensating import Compensating, Compensation
from dreamkit.training.batches import NormalisedBatches

CPU = torch.device("cpu")
TINY = 1e-10
"""A ridge that pulls at nothing."""


def images(count=32, size=(3, 8, 8)):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def smaller(model, removed, x, ridge=TINY, centred=True, size=None):
    """Return a network without some channels, made up for."""
    graph = ChannelGraph(copy.deepcopy(model), size or tuple(x.shape[1:]))
    groups, _ = graph.groups()
    seen = readings(graph.model, groups, x.split(7))
    after = compensate(graph.model, groups, removed, seen, ridge, centred)
    graph.remove(removed)
    return graph.model.eval(), seen, after


def follow(layer, channel, terms, shift=0.0):
    """Let a channel be a sum of others of its layer, times numbers."""
    with torch.no_grad():
        for parameter in filter(lambda p: p is not None, layer.parameters()):
            parameter[channel] = sum(factor * parameter[other] for other, factor in terms.items())
        if shift:
            layer.bias[channel] += shift


class Two(nn.Module):
    """Two layers with nothing between them but an activation."""

    def __init__(self, first, second, activation=None):
        super().__init__()
        self.first, self.second, self.activation = first, second, activation or nn.Identity()

    def forward(self, x):
        y = self.second(self.activation(self.first(x)))
        return y.flatten(2).mean(2) if y.dim() == 4 else y


def same(model, other, x, atol=1e-4):
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("reader", ["1x1", "3x3", "reflected", "strided", "grouped"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_follows_others_is_told_by_them(reader, bias):
    torch.manual_seed(0)
    second = {
        "1x1": lambda: nn.Conv2d(6, 4, 1, bias=bias),
        "3x3": lambda: nn.Conv2d(6, 4, 3, bias=bias),
        "reflected": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=bias),
        "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, bias=bias),
        "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2, bias=bias),
    }[reader]()
    model = Two(nn.Conv2d(3, 6, 3, bias=bias), second).eval()
    lost = 1
    follow(model.first, 1, {0: 2.0, 2: -1.0})
    if reader == "grouped":  # the same place of each group goes
        follow(model.first, 4, {3: 0.5, 5: 1.5})
        lost = 2
    name = ChannelGraph(model, (3, 8, 8)).groups()[0][0].name
    x = images()
    student, _, _ = smaller(model, {name: [1]}, x, centred=bias)
    assert student.first.out_channels == 6 - lost
    same(student, model, x)


def test_by_hand_a_lost_input_is_made_up_for_by_its_double():
    # x₂ = 2 x₁ + 1: y = 3 x₁ + 5 x₂ + 0.5 = 13 x₁ + 5.5.
    model = Two(nn.Linear(1, 2), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[1.0], [2.0]]))
        model.first.bias.copy_(torch.tensor([0.0, 1.0]))
        model.second.weight.copy_(torch.tensor([[3.0, 5.0]]))
        model.second.bias.fill_(0.5)
    student, _, _ = smaller(model, {"first": [1]}, images(2000, (1,)), size=(1,))
    assert student.second.weight.item() == pytest.approx(13, abs=1e-4)
    assert student.second.bias.item() == pytest.approx(5.5, abs=1e-4)


def test_it_is_the_least_squares_of_what_a_layer_reads():
    torch.manual_seed(1)
    model = Two(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False), nn.ReLU()).eval()
    x = images()
    ridge = 0.05
    student, _, _ = smaller(model, {"first": [0, 3]}, x, ridge=ridge, centred=False)
    read = F.relu(model.first(x)).detach().double().transpose(0, 1).flatten(1)
    kept, gone = read[[1, 2, 4]], read[[0, 3]]
    pull = (ridge + (3 / read.shape[1]) ** 2) * read.square().mean() * torch.eye(3) * read.shape[1]
    told = torch.linalg.solve(kept @ kept.T + pull, kept @ gone.T)
    weight = model.second.weight.detach().double().flatten(1)
    expected = weight[:, [1, 2, 4]] + weight[:, [0, 3]] @ told.T
    torch.testing.assert_close(student.second.weight.double().flatten(1), expected)


def test_inputs_side_by_side_of_a_flattened_map_are_of_one_channel(toys):
    model = toys.flattened()
    follow(model.conv1, 2, {0: 3.0})
    x = images(4000, (3, 4, 4))
    student, seen, after = smaller(model, {"conv1": [2]}, x)
    assert seen["fc1"].total.shape == (1, 4)
    assert after["fc1"].total.shape == (1, 3)
    same(student, model, x)


def test_channels_that_go_together_are_not_side_by_side():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    group = groups[1]
    assert group.channels == 2  # two filters each, 0 with 2 and 1 with 3
    seen = readings(model, [group], [images()])
    assert seen["4"].total.shape == (1, 4)
    after = compensate(model, [group], {group.name: [0]}, seen, 1e-3, True)
    assert after["4"].total.shape == (1, 2)


def test_channels_of_other_groups_tell_too(toys):
    model = toys.concatenated()  # what two layers make is read by one
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    reader = next(
        m.layer
        for g in groups
        for m in g.members
        if m.axis == "in" and sum(n.layer == m.layer for h in groups for n in h.members) > 1
    )
    name = next(g.name for g in groups if any(m.layer == reader for m in g.members))
    seen = readings(model, groups, [images()])
    channels = model.get_submodule(reader).weight.shape[1]
    assert seen[reader].total.shape == (1, channels)
    after = compensate(copy.deepcopy(model), groups, {name: [0]}, seen, 1e-3, True)
    assert after[reader].total.shape == (1, channels - 1)


def test_nothing_removed_changes_no_bit(toys):
    model = toys.residual()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = readings(model, groups, [images()])
    assert compensate(model, groups, {}, seen, 1e-3, True) == seen
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), name


def test_what_is_seen_after_a_removal_is_what_the_smaller_network_reads(toys):
    model = toys.residual()
    x = images()
    graph = ChannelGraph(copy.deepcopy(model), (3, 8, 8))
    groups, _ = graph.groups()
    removed = {"conv3": [1, 4]}
    seen = readings(graph.model, groups, [x])
    after = compensate(graph.model, groups, removed, seen, 1e-3, True)
    graph.remove(removed)
    anew = readings(graph.model, graph.groups()[0], [x])
    for centred in (True, False):
        ours, theirs = after["fc"].moments(centred), anew["fc"].moments(centred)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(after["fc"].mean, anew["fc"].mean, rtol=1e-5, atol=0)


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised as it runs."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=self.padding)


def test_layers_that_compute_their_weights_or_share_them_are_left_alone():
    torch.manual_seed(0)
    model = Two(nn.Conv2d(3, 6, 3), Standardised(6, 4, 3)).eval()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    assert readings(model, groups, [images()]) == {}
    tied = Two(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)).eval()
    tied.other = nn.Conv2d(6, 4, 1)
    tied.other.weight = tied.second.weight
    groups, _ = ChannelGraph(tied, (3, 8, 8)).groups()
    assert readings(tied, groups, [images()]) == {}


def test_a_layer_that_reads_too_many_channels_is_left_alone(monkeypatch, toys):
    model = toys.two_bn()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    assert set(readings(model, groups, [images()])) == {"conv2", "fc"}
    monkeypatch.setattr("dreamkit.pruning.readings._WIDEST", 5)
    assert set(readings(model, groups, [images()])) == {"conv2"}


def test_all_channels_of_a_layer_may_be_asked_for(toys):
    model = toys.two_bn()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    seen = readings(model, groups, [images()])
    before = model.conv2.weight.clone()
    compensate(model, groups, {"conv1": [0, 1, 2, 3]}, seen, 1e-3, True)
    assert model.conv2.weight.equal(before)  # there is nothing to tell it


def looked(toys, tmp_path, options, statistics="difference"):
    teacher = toys.teacher(toys.two_bn())
    work = Compensating(options, statistics, toys.context(tmp_path))
    groups, _ = ChannelGraph(teacher.model, (3, 8, 8)).groups()
    batches = NormalisedBatches(toys.images(16), teacher.card, CPU, 8)
    work.look(teacher.model, groups, batches)
    return work, teacher.model, groups


def test_null_leaves_weights_as_they_are(toys, tmp_path):
    work, model, groups = looked(toys, tmp_path, None)
    before = model.conv2.weight.clone()
    work.make_up(model, groups, {"conv1": [0]})
    assert work.seen == {}
    assert model.conv2.weight.equal(before)


def test_means_are_made_up_for_by_statistics_or_by_the_weights(toys, tmp_path):
    made = {}
    for statistics in ("difference", "keep"):
        work, model, groups = looked(toys, tmp_path, Compensation(), statistics)
        work.make_up(model, groups, {"conv1": [0]})
        made[statistics] = model.conv2.weight.detach()
    assert not torch.allclose(made["difference"], made["keep"])


def test_a_trial_leaves_what_was_seen_for_the_next(toys, tmp_path):
    work, model, groups = looked(toys, tmp_path, Compensation())
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    work.try_on(one, {"conv1": [0]})
    work.try_on(two, {"conv1": [0]})
    toys.assert_same_tensors(one, two)
    assert not one.conv2.weight.equal(model.conv2.weight)
    work.make_up(model, groups, {"conv1": [0]})
    toys.assert_same_tensors(one, model)


def test_ranks_have_the_first_ones_weights(toys, tmp_path, monkeypatch):
    work, model, groups = looked(toys, tmp_path, Compensation())

    def broadcast(tensors, device):
        return {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(compensating.distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(compensating.distributed, "broadcast_tensors", broadcast)
    work.make_up(model, groups, {"conv1": [0]})
    for tensor in (model.conv2.weight, model.fc.weight, model.fc.bias):
        assert bool((tensor == 7).all())
    assert not bool((model.conv1.weight == 7).any())
    work.seen = {}  # no layer can make up for anything
    work.make_up(model, groups, {"conv1": [0]})


def test_a_layer_with_nothing_behind_it_to_mend_its_means_keeps_them():
    torch.manual_seed(0)
    x = images(200)
    for behind, kept in ((nn.Identity(), True), (nn.BatchNorm2d(4), False)):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), behind
        ).eval()
        groups, _ = ChannelGraph(
            nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), (3, 8, 8)
        ).groups()
        assert groups
        whole = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        seen = readings(whole, groups, x.split(50))
        assert seen["0.2"].normalised is not kept
        made = []
        for centred in (True, False):
            student = copy.deepcopy(whole)
            compensate(student, groups, {"0.0": [1]}, seen, 1e-6, centred)
            made.append(student[0][2].weight.detach())
        assert torch.equal(*made) is kept


def test_of_few_images_little_is_told_by_chance():
    # As many images as channels: least squares alone would fit them, and nothing else.
    torch.manual_seed(0)
    model = Two(nn.Linear(30, 40), nn.Linear(40, 5), nn.ReLU()).eval()
    few, others = images(32, (30,)), torch.randn(500, 30)
    removed = {"first": list(range(8))}
    made_up, _, _ = smaller(model, removed, few, ridge=1e-3, size=(30,))
    means_alone, _, _ = smaller(model, removed, few, ridge=1e6, size=(30,))
    with torch.no_grad():
        wanted = model(others)
        errors = [float((m(others) - wanted).square().mean()) for m in (made_up, means_alone)]
    assert errors[0] < 1.1 * errors[1]


def test_means_far_above_their_spread_are_no_trouble():
    torch.manual_seed(0)
    model = Two(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        model.first.bias += 1000.0
    follow(model.first, 1, {0: 2.0, 2: -1.0})
    student, _, _ = smaller(model, {"first": [1]}, images(64))
    same(student, model, images(64), atol=0.02)


class Scaled(nn.Conv2d):
    """A convolution that takes more than what it convolves."""

    def forward(self, x, scale):
        return super().forward(x) * scale


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), Scaled(6, 4, 1)

    def forward(self, x):
        return self.second(F.relu(self.first(x)), 2.0).flatten(2).mean(2)


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    model = Scaling().eval()
    groups, _ = ChannelGraph(model, (3, 8, 8)).groups()
    assert readings(model, groups, [images()]) == {}
