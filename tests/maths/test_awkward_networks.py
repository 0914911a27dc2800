"""Networks with weights that are computed, heads for training alone, gains and scripted parts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dreamkit.errors import NothingToPrune
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.unstructured import choose_weights, left_alone

SIZE = (3, 8, 8)


class Chain(nn.Module):
    def __init__(self, change=lambda layer: layer):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = change(nn.Conv2d(6, 8, 3, padding=1))
        self.third = nn.Conv2d(8, 10, 1)
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.third(F.relu(self.second(self.first(x)))).mean((2, 3)))


class WithAuxiliary(Chain):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(8, 5)
        self.auxiliary = nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.second(self.first(x)))
        out = self.fc(self.third(x).mean((2, 3)))
        if self.training:
            return {"out": out, "aux": self.auxiliary(self.hidden(x.mean((2, 3))))}
        return out


@dataclass
class Output:
    logits: Tensor


class Wrapped(Chain):
    def forward(self, x):
        return Output(super().forward(x))


class Gained(nn.Conv2d):
    """Weights that are standardised and have a gain, as NFNets'."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1], 1, 1, 1))

    def forward(self, x):
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, self.gain * weight, self.bias)


def masked(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


COMPUTED = {
    "weight_norm": weight_norm,
    "new weight_norm": parametrizations.weight_norm,
    "spectral_norm": spectral_norm,
    "torch.nn.utils.prune": masked,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_is_left_alone_with_the_reason(name):
    model = Chain(COMPUTED[name])
    groups, skipped = ChannelGraph(model, SIZE).groups()
    assert [group.name for group in groups] == ["third"]
    reasons = {left.group: left.reason for left in skipped}
    said = f"computed on the fly by {name.removeprefix('new ')}"
    assert said in reasons["first"]
    assert said in reasons["second"]
    assert set(choose_weights(model, 0.5)) == {"first.weight", "third.weight", "fc.weight"}
    assert list(left_alone(model)) == ["second"]
    assert said in left_alone(model)["second"]


def test_a_network_without_weights_of_its_own_has_nothing_to_set_to_zero():
    with pytest.raises(NothingToPrune, match="fc"):
        choose_weights(nn.ModuleDict({"fc": parametrizations.weight_norm(nn.Linear(3, 4))}), 0.5)


def test_heads_that_training_alone_runs_lose_channels_too():
    model = WithAuxiliary().eval()
    graph = ChannelGraph(model, SIZE)
    groups, skipped = graph.groups()
    assert "only training runs what makes them" in {
        s.reason for s in skipped if s.group == "hidden"
    }
    graph.remove({group.name: [0] for group in groups})
    assert model.hidden.in_features == model.second.out_channels == 7
    assert model.train()(torch.randn(2, *SIZE))["aux"].shape == (2, 4)
    assert model.eval()(torch.randn(2, *SIZE)).shape == (2, 4)


def test_outputs_in_an_object_of_any_class_are_left_alone():
    _, skipped = ChannelGraph(Wrapped(), SIZE).groups()
    assert [(s.group, s.reason) for s in skipped] == [("fc", "makes the model's outputs")]


def test_gains_of_standardised_weights_go_with_their_channels():
    model = Chain(lambda layer: Gained(6, 8, 1)).eval()
    graph = ChannelGraph(model, SIZE)
    groups, _ = graph.groups()
    assert {"first", "second", "third"} == {group.name for group in groups}
    graph.remove({"second": [1, 2]})
    assert model.second.gain.shape == (6, 1, 1, 1)
    assert model(torch.randn(2, *SIZE)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_scripted_is_left_alone():
    model = Chain()
    model.second = torch.jit.script(nn.Conv2d(6, 8, 1))
    _, skipped = ChannelGraph(model.eval(), SIZE).groups()
    assert "TorchScript, which cannot be cut" in {s.group: s.reason for s in skipped}["first"]


def test_trials_leave_the_very_same_parameters():
    model = Chain()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    ChannelGraph(model, SIZE)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.second.out_channels == 8
