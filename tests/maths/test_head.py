"""Giving a classifier more outputs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dreamkit.errors import ArtifactError, TeacherMismatch
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.head import find_head, grow_head
from dreamkit.pruning.record import PruningRecord
from dreamkit.teachers.small_resnet import SmallResNet

SIZE = (3, 32, 32)
MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), "fc"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5), "classifier.1"),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=5), "classifier.1"),
    "dla34": (lambda: timm.create_model("dla34", num_classes=5), "fc"),
    "cifar resnet20": (lambda: SmallResNet(20, 5), "fc"),
}


@pytest.mark.parametrize("name", MODELS)
def test_new_outputs_come_after_the_old_ones_which_stay(name):
    build, head = MODELS[name]
    model = build().eval()
    before, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    pruning_record = PruningRecord()
    assert grow_head(model, (3, 64, 64), 8, seed=0, pruning_record=pruning_record) == head
    logits = model(x)
    assert logits.shape == (2, 8)
    expected = before(x)  # another size of matrix rounds another way
    assert (logits[:, :5] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.get_submodule(head).weight[5:].std() > 0
    again = build().eval()
    PruningRecord.from_json(pruning_record.to_json()).rebuild(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), logits)
    assert str(again) == str(model)


def test_the_seed_decides_the_new_weights():
    heads = []
    for seed in (0, 0, 1):
        model = SmallResNet(8, 5)
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.zero_()
        state = torch.get_rng_state()
        grow_head(model, SIZE, 7, seed, PruningRecord())
        assert torch.equal(torch.get_rng_state(), state)
        assert model.fc.weight[:5].eq(0).all()
        limit = 1 / 64**0.5  # torch's linear layers: uniform, up to 1 / √inputs
        assert 0.5 * limit < model.fc.weight[5:].abs().max() <= limit
        heads.append(model.fc.weight[5:])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_what_was_pruned_can_grow_and_what_grew_be_pruned():
    x = torch.randn(2, *SIZE)
    model = SmallResNet(8, 5).eval()
    graph = ChannelGraph(model, SIZE)
    group = next(g for g in graph.groups()[0] if any(m.layer == "fc" for m in g.members))
    graph.remove({group.name: [0, 3]})
    pruning_record = graph.pruning_record
    grow_head(model, SIZE, 9, 0, pruning_record)
    later = ChannelGraph(model, SIZE)
    group = next(g for g in later.groups()[0] if any(m.layer == "fc" for m in g.members))
    later.remove({group.name: [1]})
    assert model.fc.weight.shape == (9, 64 - 3)
    again = SmallResNet(8, 5).eval()
    later.pruning_record.after(pruning_record).rebuild(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x):
        return self.a(x.flatten(1)) + self.b(x.flatten(1))


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)).log_softmax(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_TwoHeads(), "unknown kind: outputs should come from one last layer.* a, b"),
        (nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()), "1x1 convolution .*is Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), "unknown kind"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)), "unknown kind.* 1, 2"),
        (_Scaled(), "old outputs are not what they were"),
        (nn.Flatten(), "none that can be told"),
    ],
    ids=["sum", "2x2 kernel", "spots as classes", "norm", "softmax", "no layer"],
)
def test_heads_of_an_unknown_kind(model, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TeacherMismatch, match=message):
        grow_head(model.eval(), (3, 2, 2), 9, 0, PruningRecord())
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_record_that_does_not_fit():
    for grown in ({"nothing.weight": 9}, {"fc.weight": 3}, {"fc.weight": "9"}, {"fc.weight": 0}):
        with pytest.raises(ArtifactError, match="could be grown"):
            PruningRecord({}, {}, grown).rebuild(SmallResNet(8, 5))


def test_find_head_leaves_the_model_alone():
    model = SmallResNet(8, 5).train()
    before = copy.deepcopy(model.state_dict())
    assert find_head(model, SIZE) == "fc"
    assert model.training
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


@torch.library.custom_op("dreamkit_tests::as_it_is", mutates_args=())
def as_it_is(x: Tensor) -> Tensor:
    """Do nothing, in a way that cannot be followed."""
    return x.clone()


class Ending(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = SmallResNet(8, 5)

    def forward(self, x):
        return torch.ops.dreamkit_tests.as_it_is(self.body(x))


class EndingRule:
    """``as_it_is``: channels are what they were."""

    targets = (torch.ops.dreamkit_tests.as_it_is,)

    def follow(self, call):
        return call.repeat()


def test_the_head_is_found_by_rules_of_others():
    model = Ending().eval()
    with pytest.raises(TeacherMismatch, match="the head is of an unknown kind"):
        find_head(model, SIZE)
    assert grow_head(model, SIZE, 7, 0, PruningRecord(), [EndingRule()]) == "body.fc"
    assert model(torch.zeros(1, *SIZE)).shape == (1, 7)
