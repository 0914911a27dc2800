"""Least squares between what is left of each layer and what the layer put out before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from dreamkit.pruning import activations
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.reconstruction import reconstruct
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.unstructured import choose_weights, remove_weights

SIZE = (3, 8, 8)


def images(count=32, size=SIZE):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def pruned(model, removals, size=SIZE):
    """Return a copy without some channels, and what it lacks."""
    graph = ChannelGraph(copy.deepcopy(model), size, PruningRecord())
    graph.remove(removals)
    return graph.model, graph.pruning_record


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def error(student, teacher, x):
    with torch.no_grad():
        return float((student(x) - teacher(x)).square().mean())


def test_by_hand_a_lost_input_is_made_up_for_by_its_double():
    # Both inputs of the layer are the same number: y = 2 a + 3 b = 5 a once b is gone.
    teacher = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    with torch.no_grad():
        teacher[0].weight.fill_(1)
        teacher[0].bias.zero_()
        teacher[1].weight.copy_(torch.tensor([[2.0, 3.0]]))
        teacher[1].bias.fill_(0.5)
    student = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        student[0].weight.fill_(1)
        student[0].bias.zero_()
        student[1].weight.fill_(2)
        student[1].bias.fill_(0.5)
    kept = {"0.weight": [[0], None], "0.bias": [[0]], "1.weight": [None, [0]]}
    fitted = reconstruct(student, teacher, PruningRecord(kept), [images(20, (1,))], ridge=1e-9)
    assert fitted == ["0", "1"]
    assert student[1].weight.item() == pytest.approx(5, abs=1e-4)
    assert student[1].bias.item() == pytest.approx(0.5, abs=1e-4)
    assert student[0].weight.item() == pytest.approx(1, abs=1e-4)


def test_the_fit_is_that_of_least_squares(toys):
    teacher = toys.two_bn()
    student, pruning_record = pruned(teacher, {"conv1": [1]})
    before = student.conv2.weight.detach().clone()
    x = images()
    ridge = 1e-2
    reconstruct(student, teacher, pruning_record, [x[:20], x[20:]], ridge=ridge)

    def given(model):
        return F.relu(model.bn1(model.conv1(x)))

    with torch.no_grad():
        patches = F.unfold(given(student), 3, padding=1).transpose(0, 1).flatten(1).double()
        wanted = teacher.conv2(given(teacher)).transpose(0, 1).flatten(1).double()
    strength = ridge * (patches @ patches.T).diagonal().mean()
    # Least squares with the pull to the old weights as more rows.
    rows = torch.cat([patches.T, strength.sqrt() * torch.eye(len(patches)).double()])
    old = strength.sqrt() * before.flatten(1).T.double()
    expected = torch.linalg.lstsq(rows, torch.cat([wanted.T, old])).solution.T
    torch.testing.assert_close(
        student.conv2.weight.flatten(1).double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["two_bn", "residual"])
def test_what_is_left_is_nearer_to_the_teacher(toys, name):
    teacher = getattr(toys, name)()
    group = {"two_bn": "conv1", "residual": "conv3"}[name]
    student, pruning_record = pruned(teacher, {group: [0, 2]})
    x = images()
    before, kept = error(student, teacher, x), state(teacher)
    reconstruct(student, teacher, pruning_record, [x])
    assert error(student, teacher, x) < 0.7 * before
    assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_nothing_lost_changes_nothing(toys):
    teacher = toys.two_bn()
    student = toys.two_bn()
    reconstruct(student, teacher, PruningRecord(), [images()])
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-2, atol=1e-4)


def test_batch_norm_becomes_the_teachers(toys):
    teacher = toys.two_bn()
    student, pruning_record = pruned(teacher, {"conv1": [1]})
    student.train()
    student(images())  # other statistics
    student.bn1.weight.data.mul_(2)
    reconstruct(student, teacher, pruning_record, [images()])
    for key in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(getattr(student.bn1, key), getattr(teacher.bn1, key)[[0, 2, 3]])
    assert student.training, "modes are given back"


def test_weights_that_are_gone_stay_gone(toys):
    teacher, student = toys.two_bn(), toys.two_bn()
    masks = choose_weights(student, 0.6)
    remove_weights(student, masks)
    x = images()
    pruned_error = error(student, teacher, x)
    reconstruct(student, teacher, PruningRecord(), [x], masks)
    assert error(student, teacher, x) < 0.7 * pruned_error
    for name, mask in masks.items():
        assert bool((student.get_parameter(name)[mask == 0] == 0).all())
    # Without a mask all of them are free again: the teacher's own weights are the best.
    reconstruct(student, teacher, PruningRecord(), [x], ridge=1e-9)
    assert error(student, teacher, x) < 1e-6


def test_the_masked_fit_is_that_of_each_outputs_own_inputs():
    teacher = nn.Linear(4, 3)
    student = copy.deepcopy(teacher)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]])
    with torch.no_grad():
        student.weight.mul_(mask)
    x = images(40, (4,)) @ torch.tensor(
        [[1.0, 0.5, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    )
    net, whole = nn.Sequential(student), nn.Sequential(teacher)
    reconstruct(net, whole, PruningRecord(), [x], {"0.weight": mask}, ridge=1e-9)
    wanted = teacher(x).detach()
    for output in range(3):
        on = mask[output].bool()
        rows = torch.cat([x[:, on], torch.ones(40, 1)], dim=1)
        expected = torch.linalg.lstsq(rows, wanted[:, output, None]).solution.flatten()
        torch.testing.assert_close(student.weight[output, on], expected[:-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.bias[output], expected[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_fitted_each_for_itself(groups):
    teacher = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=groups))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight.add_(0.3)
        student[0].bias.zero_()
    assert reconstruct(student, teacher, PruningRecord(), [images(16, (4, 9, 7))], ridge=1e-9) == [
        "0"
    ]
    torch.testing.assert_close(student[0].weight, teacher[0].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(student[0].bias, teacher[0].bias, rtol=1e-3, atol=1e-4)


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised as they are used."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class PaddedByItself(nn.Conv2d):
    """A convolution that pads what it is given, as TensorFlow's do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 4, 0, 4)), self.weight, self.bias)


class Twice(nn.Module):
    """A layer that a pass calls twice, and one that it calls never."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (lambda: nn.Sequential(Standardised(3, 4, 3, padding=1)), SIZE),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), SIZE),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), SIZE),
        (lambda: nn.Sequential(PaddedByItself(3, 4, 5)), SIZE),
        (lambda: nn.Sequential(PaddedByItself(3, 4, 5)), (3, 2, 2)),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))), (3,)),
        (lambda: nn.Sequential(nn.Linear(9000, 2)), (9000,)),
        (Twice, (3,)),
    ],
)
def test_layers_of_other_kinds_stay_as_they_are(network, size):
    teacher = network()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    before = state(student)
    assert reconstruct(student, teacher, PruningRecord(), [images(8, size)]) == []
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


class Attended(nn.Module):
    """A convolution along the channels' means, as in efficient channel attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.attention = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(input=x).relu().mean((2, 3))
        return self.last(x * self.attention(x[:, None])[:, 0])


def test_zeros_of_layers_that_are_not_fitted_stay_too(toys):
    teacher = toys.fill(Attended())
    student = copy.deepcopy(teacher)
    masks = {name: torch.ones_like(p) for name, p in student.named_parameters() if p.dim() > 1}
    masks["attention.weight"][..., 1] = 0
    with torch.no_grad():
        student.attention.weight.mul_(masks["attention.weight"])
    fitted = reconstruct(student, teacher, PruningRecord(), [images()], masks)
    assert fitted == ["conv", "last"]
    assert student.attention.weight[..., 1].item() == 0
    assert student.attention.weight[..., 0].item() != 0


def test_patches_are_taken_a_part_at_a_time(toys, monkeypatch):
    teacher = toys.two_bn()
    (whole, pruning_record), (parts, _) = (pruned(teacher, {"conv1": [1]}) for _ in range(2))
    reconstruct(whole, teacher, pruning_record, [images()])
    monkeypatch.setattr("dreamkit.pruning.reconstruction._AT_ONCE", 3 * 36 * 64)
    reconstruct(parts, teacher, pruning_record, [images()])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_progress_is_told(toys):
    told = []
    reconstruct(
        toys.two_bn(),
        toys.two_bn(),
        PruningRecord(),
        [images(4)],
        advance=lambda *at: told.append(at),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_weights_with_channels_last_are_fitted_alike():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        student, own = copy.deepcopy(teacher), copy.deepcopy(teacher)
        masks = choose_weights(student, 0.5)
        remove_weights(student, masks)
        student, own = student.to(memory_format=memory), own.to(memory_format=memory)
        masks = {name: mask.contiguous(memory_format=memory) for name, mask in masks.items()}
        assert len(reconstruct(student, own, PruningRecord(), [images()], masks)) == 2
        found.append(state(student))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name


def test_what_the_teacher_puts_out_is_kept_as_far_as_memory_allows(monkeypatch):
    torch.manual_seed(0)
    teacher = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)])
    found, passes = [], []
    teacher[0].register_forward_hook(lambda *_: passes.append(1))
    # Each layer puts out 3·8·8 numbers an image.
    for held, expected in ((1, 5 * 3), (2 * 64 * 3 * 64, 3 * 3), (2**28, 1 * 3)):
        monkeypatch.setattr(activations, "HELD", held)
        student = copy.deepcopy(teacher)
        student[0]._forward_hooks.clear()
        masks = choose_weights(student, 0.5)
        remove_weights(student, masks)
        passes.clear()
        batches = list(images(64).split(32))
        assert len(reconstruct(student, teacher, PruningRecord(), batches, masks)) == 5
        assert len(passes) == expected, "a small pass for sizes and one a batch, each time"
        found.append(state(student))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
