"""Toy networks with weights set by formula, so that nothing here depends on a random generator.

``--import-mode=importlib`` lets no test module import another; the networks come as fixtures.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.report.run_log import MemoryLog
from dreamkit.types import LatencyBackend, RunContext, StoredImages, Teacher


@pytest.fixture(autouse=True)
def _one_thread():
    """Pin one thread: the same sums in the same order, and no quarrel over a small machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fill(model, scale=0.4):
    """Set every weight to a sine of its position, and BatchNorm's statistics to be uneven."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            wave = torch.sin(torch.arange(tensor.numel()) * 1.7 + number).view(tensor.shape)
            if name.endswith("running_var"):
                tensor.copy_(0.8 + 0.3 * wave)
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * wave)
            elif tensor.dim() == 1 and "bn" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * wave)
            else:
                tensor.copy_(scale * wave)
    return model.eval()


class TwoBN(nn.Module):
    """conv1 → bn1 → relu → conv2 → bn2 → relu → mean → fc."""

    def __init__(self, in_channels=3, classes=3, activation=F.relu):
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        return self.fc(x.mean(dim=(2, 3)))


class Residual(nn.Module):
    """conv1 → bn1 → relu = x; x + bn2(conv2(x)) → relu → conv3 → bn3 → relu → mean → fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(dim=(2, 3)))


class Plain(nn.Module):
    """conv1 → relu → conv2 → relu → mean → fc, with biases and without BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Depthwise(nn.Module):
    """conv1 → bn1 → depthwise → bn2 → pointwise → mean → fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        return self.fc(F.relu(self.pointwise(x)).mean(dim=(2, 3)))


class Flattened(nn.Module):
    """conv1 (3 to 4, stride 2) → relu → flatten → fc: each channel is H/2·W/2 inputs of fc."""

    def __init__(self, side=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(4 * (side // 2) ** 2, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.relu(self.conv1(x)).flatten(1))))


class Concatenated(nn.Module):
    """left (3 to 4) and right (3 to 5) side by side into merge (9 to 6) → mean → fc."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 5, 1)
        self.merge = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(torch.cat([self.left(x), self.right(x)], dim=1))
        return self.fc(F.relu(self.merge(x)).mean(dim=(2, 3)))


class ConvHead(nn.Module):
    """conv1 → bn1 → relu → a 1×1 convolution as classifier → mean."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(F.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3))


def make_card(size=(3, 8, 8), classes=3, **changes):
    """Return a card; the statistics are chosen so that 1/std is exact."""
    mean, std = ((0.5, 0.4, 0.3), (0.25, 0.5, 0.125)) if size[0] == 3 else ((0.5,), (0.25,))
    known = {"name": "toy", "input_size": size, "mean": mean, "std": std, "num_classes": classes}
    return Card(**(known | {"origin": "tests"} | changes))


def make_teacher(model, card=None, builder=None):
    """Return a teacher around a model."""
    return Teacher(model, card or make_card(), builder or {})


def make_images(count, size=(3, 8, 8), classes=3):
    """Return stored images of a fixed pattern, with labels in turn."""
    total = count * size[0] * size[1] * size[2]
    pixels = (torch.arange(total) * 7919 % 251).to(torch.uint8).view(count, *size)
    return StoredImages(pixels, torch.arange(count) % classes)


class Untimed(LatencyBackend):
    """A latency target that fails the test if anything is timed on it."""

    batch_size = 1
    folds_norms = True

    def describe(self):
        return {"device": "untimed"}

    def time(self, modules):
        raise AssertionError("nothing here needs a latency")


def make_context(folder, latency=None, evaluation=None, seed=3, log=None):
    """Return where an application works; it tells a log in memory, and times nothing."""
    log, latency = log or MemoryLog(), latency or Untimed()
    return RunContext(seed, torch.device("cpu"), folder, log, latency, evaluation)


def make_state(model):
    """Return everything about a model that a caller may rely on, to compare before and after."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": {k: (id(p.grad), p.requires_grad) for k, p in model.named_parameters()},
        "identities": {k: id(p) for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in model.named_modules()
        },
    }


def assert_same_tensors(model, other):
    """Fail naming a tensor in which two models of one architecture differ."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def assert_same_state(model, before):
    """Fail naming what of a model's state is not as it was."""
    after = make_state(model)
    for part in ("gradients", "identities", "modes", "hooks"):
        assert after[part] == before[part], part
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name


@pytest.fixture
def toys():
    """Toy networks and what goes with them: ``toys.two_bn()``, ``toys.card(...)`` and so on."""
    return SimpleNamespace(
        two_bn=lambda **options: fill(TwoBN(**options)),
        residual=lambda: fill(Residual()),
        plain=lambda: fill(Plain()),
        depthwise=lambda: fill(Depthwise()),
        flattened=lambda: fill(Flattened()),
        concatenated=lambda: fill(Concatenated()),
        conv_head=lambda: fill(ConvHead()),
        fill=fill,
        copy=copy.deepcopy,
        card=make_card,
        teacher=make_teacher,
        images=make_images,
        context=make_context,
        state=make_state,
        assert_same_state=assert_same_state,
        assert_same_tensors=assert_same_tensors,
    )
