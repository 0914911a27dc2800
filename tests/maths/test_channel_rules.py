"""Rules of others: layers and operations that pruning goes through once it is told how."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from dreamkit.errors import PluginError
from dreamkit.plugins import build_registries
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord

SIZE = (3, 4, 4)


class Scale(nn.Module):
    """Channels sorted by nothing but written so that no operation tells which is which."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.factor = nn.Parameter(torch.arange(1.0, channels + 1).view(1, channels, 1, 1))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, torch.diag(self.factor.flatten()))


@torch.library.custom_op("dreamkit_tests::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    """Put the second half of the channels first."""
    return torch.cat(x.chunk(2, 1)[::-1], 1)


class Net(nn.Module):
    """stem → what is asked for → fc."""

    def __init__(self, middle):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.middle = middle
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.middle(self.stem(x)).mean((2, 3)))


class Swap(nn.Module):
    def forward(self, x):
        return torch.ops.dreamkit_tests.swap_halves(x)


class ScaleRule:
    """``Scale``: a factor for each channel."""

    targets = (Scale,)

    def follow(self, call):
        (channels,) = call.channels
        call.holds(channels, 1, {"factor": 1}, sizes=("channels",))
        return channels


class SwapRule:
    """``swap_halves``: both halves keep the same places."""

    targets = (torch.ops.dreamkit_tests.swap_halves,)

    def follow(self, call):
        call.couple_groups(call.along(call.channels[0], 1), 2)
        return call.repeat()


class SilentRule(ScaleRule):
    def follow(self, call):
        return None


class ShapelessRule(ScaleRule):
    def follow(self, call):
        return call.channels[0].sum(0)


class FailingRule(ScaleRule):
    def follow(self, call):
        raise KeyError("factor")


def images():
    return torch.sin(torch.arange(2 * 3 * 16) * 0.37).view(2, *SIZE)


def net(middle):
    model = Net(middle).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.cos(torch.arange(parameter.numel()) * 0.7 + number)
            parameter.copy_(values.view(parameter.shape))
    return model


def reasons(graph):
    return {skipped.group: skipped.reason for skipped in graph.groups()[1]}


@pytest.mark.parametrize("middle", [lambda: Scale(4), Swap], ids=["layer", "operation"])
def test_without_a_rule_the_channels_stay_and_the_reason_is_given(middle):
    graph = ChannelGraph(net(middle()), SIZE)
    assert graph.groups()[0] == []
    assert reasons(graph)["stem"].startswith("they go through")


def test_with_a_rule_a_layer_of_ones_own_is_pruned():
    model, whole = net(Scale(4)), net(Scale(4))
    graph = ChannelGraph(model, SIZE, rules=[ScaleRule()])
    (group,) = graph.groups()[0]
    assert {(m.layer, m.axis) for m in group.members} == {
        ("stem", "out"),
        ("middle", "out"),
        ("fc", "in"),
    }
    with torch.no_grad():
        whole.fc.weight[:, 1] = 0  # as if the channel were not there
    graph.remove({group.name: [1]})
    assert model.middle.channels == 3
    assert torch.equal(model.middle.factor, whole.middle.factor[:, [0, 2, 3]])
    torch.testing.assert_close(model(images()), whole(images()))
    # Nobody needs the rule to do it again.
    fresh = net(Scale(4))
    PruningRecord.from_json(json.loads(json.dumps(graph.pruning_record.to_json()))).rebuild(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), model(images()))


def test_with_a_rule_an_operation_of_ones_own_is_gone_through():
    model, whole = net(Swap()), net(Swap())
    graph = ChannelGraph(model, SIZE, rules=[SwapRule()])
    (group,) = graph.groups()[0]
    assert group.channels == 2, "two pairs"
    with torch.no_grad():
        whole.fc.weight[:, [0, 2]] = 0
    graph.remove({group.name: [0]})
    assert model.stem.out_channels == 2
    torch.testing.assert_close(model(images()), whole(images()))


def test_a_rule_of_a_plugin_comes_before_those_of_pytorchs_layers():
    class Own(nn.Conv2d):
        """A convolution whose inputs are to stay."""

    class OwnRule:
        targets = (Own,)

        def follow(self, call):
            call.fix(call.channels[0], "we say so")
            made = {"weight": 0, "bias": 0}
            return call.makes(call.target.out_channels, 1, made, ("out_channels",))

    layers = [nn.Conv2d(3, 4, 1), Own(4, 5, 1), nn.Conv2d(5, 2, 1)]
    known = build_registries()["channel_rules"]
    rules = [known.resolve(name)() for name in known]
    graph = ChannelGraph(nn.Sequential(*layers).eval(), SIZE, rules=[*rules, OwnRule()])
    assert [(group.name, group.channels) for group in graph.groups()[0]] == [("1", 5)]
    assert reasons(graph)["0"] == "we say so"


def test_a_rule_that_answers_nothing_rules_its_channels_out():
    graph = ChannelGraph(net(Scale(4)), SIZE, rules=[SilentRule()])
    assert graph.groups()[0] == []
    assert reasons(graph)["stem"] == "middle does not follow them"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (FailingRule(), "the channel rule FailingRule of middle failed: KeyError"),
        (ShapelessRule(), r"ShapelessRule of middle answers torch.int64 \(4, 4, 4\) for an output"),
    ],
)
def test_a_rule_that_is_wrong_is_named(rule, message):
    with pytest.raises(PluginError, match=message):
        ChannelGraph(net(Scale(4)), SIZE, rules=[rule])
