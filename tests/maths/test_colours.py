"""Colours and contrast of dreams, against what a first layer tells of training images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.report.run_log import MemoryLog
from dreamkit.report.tables import pixel_rows
from dreamkit.stages import colours
from dreamkit.stages.colours import Pixels, contrast, doubts, pixels_of, report_colours
from dreamkit.synthesizers.first_layer import TrainingPixels, chroma, training_pixels
from dreamkit.types import StoredImages

LENGTH = 4.0


class Stem(nn.Module):
    """A convolution with a bias, a BatchNorm and a classifier."""

    def __init__(self, stride=1, before=None, channels=3):
        super().__init__()
        self.before = before or nn.Identity()
        self.conv = nn.Conv2d(channels, 12, 3, padding=1, stride=stride)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(self.before(x)))).mean((2, 3)))


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(0)


def made(draws, **options):
    model = Stem(**options)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws)
    return model.eval()


def pixels(draws, count=256, side=16, channels=3):
    """Return pixels in [0, 1] of known mean, spread and correlation: (N, C, H, W)."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    near = torch.exp(-torch.cdist(places, places) / LENGTH)
    root = torch.linalg.cholesky(near + 1e-6 * torch.eye(side**2))
    fields = torch.randn(count, channels, side**2, generator=draws) @ root.T
    mixed = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.6, 0.6, 0.5]])[:channels, :channels]
    fields = (
        torch.einsum("cd,ndp->ncp", mixed, fields)
        * torch.tensor([0.1, 0.12, 0.15])[:channels, None]
    )
    mean = torch.tensor([0.6, 0.5, 0.4])[:channels, None]
    return (mean + fields).view(count, channels, side, side)


def trained_on(model, images, card):
    """Store the statistics that the images have, as training would."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (card.mean, card.std))
    with torch.no_grad():
        seen = model.conv(model.before((images - mean) / std))
    model.bn.running_mean.copy_(seen.mean((0, 2, 3)))
    model.bn.running_var.copy_(seen.var((0, 2, 3)))
    return model


@pytest.mark.parametrize("stride", [1, 2])
def test_mean_and_spread_of_what_a_network_was_trained_on(toys, draws, stride):
    images = pixels(draws)
    teacher = toys.teacher(made(draws, stride=stride), card=toys.card((3, 16, 16)))
    trained_on(teacher.model, images, teacher.card)
    told = training_pixels(teacher)
    assert told.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.02)
    assert told.std == pytest.approx(images.std((0, 2, 3)).tolist(), rel=0.15)
    assert told.chroma == pytest.approx(chroma(images.transpose(0, 1).flatten(1).cov()), rel=0.15)
    assert told.misfit < 0.15


def test_of_one_channel(toys, draws):
    images = pixels(draws, channels=1)
    teacher = toys.teacher(made(draws, channels=1), card=toys.card((1, 16, 16)))
    trained_on(teacher.model, images, teacher.card)
    told = training_pixels(teacher)
    assert told.mean == pytest.approx([0.6], abs=0.02)
    assert told.std == pytest.approx([0.1], rel=0.1)
    assert told.chroma == 0


def test_channels_that_are_dead_in_training_tell_nothing(toys, draws):
    images = pixels(draws)
    teacher = toys.teacher(made(draws), card=toys.card((3, 16, 16)))
    teacher.model.conv.weight.data[:2] = 0
    trained_on(teacher.model, images, teacher.card)
    told = training_pixels(teacher)
    assert told.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.02)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.bn.reset_running_stats(),
        lambda model: model.bn.running_mean.add_(50),
        lambda model: model.bn.running_mean[0].fill_(torch.nan),
        lambda model: model.bn.running_var[0].fill_(torch.inf),
        lambda model: model.bn.running_var.copy_(10.0 ** torch.arange(-6, 6)),
        lambda model: setattr(model, "before", nn.ReLU()),
        lambda model: setattr(model, "before", nn.AvgPool2d(16)),
        lambda model: setattr(model, "bn", nn.Identity()),
    ],
    ids=[
        "untrained",
        "colours",
        "nan",
        "inf",
        "no picture's",
        "not linear",
        "of the whole image",
        "none",
    ],
)
def test_nothing_is_told_where_it_cannot_be(toys, draws, spoil):
    images = pixels(draws)
    teacher = toys.teacher(made(draws), card=toys.card((3, 16, 16)))
    trained_on(teacher.model, images, teacher.card)
    assert training_pixels(teacher) is not None
    spoil(teacher.model)
    assert training_pixels(teacher) is None


def test_a_device_without_float64_is_asked_for_none(toys, draws):
    class Elsewhere(torch.Tensor):
        """A tensor on such a device, as MPS is one; so is what is computed of it."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.double:
                raise TypeError("this device has no float64")
            found = super().__torch_function__(func, types, args, kwargs)
            return found.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else found

    teacher = toys.teacher(made(draws), card=toys.card((3, 16, 16)))
    trained_on(teacher.model, pixels(draws), teacher.card)
    expected = training_pixels(teacher)
    for name, buffer in teacher.model.bn.named_buffers():
        setattr(teacher.model.bn, name, buffer.as_subclass(Elsewhere))
    teacher.model.conv.weight = nn.Parameter(teacher.model.conv.weight.as_subclass(Elsewhere))
    assert training_pixels(teacher) == expected


def test_the_network_is_left_as_it_was(toys, draws):
    teacher = toys.teacher(made(draws), card=toys.card((3, 16, 16)))
    teacher.model.train()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    trained_on(teacher.model, pixels(draws, 8), teacher.card)
    before |= {k: v.clone() for k, v in teacher.model.state_dict().items() if "running" in k}
    training_pixels(teacher)
    assert teacher.model.training
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


# --- of dreams --------------------------------------------------------------------------------


def stored(values):
    """Return images of one row, the same values in every channel but scaled: (1, 2, 1, W)."""
    row = torch.tensor(values, dtype=torch.uint8)
    images = torch.stack([row, row // 2]).view(1, 2, 1, -1)
    return StoredImages(images, torch.zeros(1, dtype=torch.int64))


def test_pixels_by_hand():
    found = pixels_of(stored([0, 0, 255, 51]))
    assert found.mean == pytest.approx((0.3, (127 + 25) / 4 / 255))
    assert found.std[0] == pytest.approx((((0.3**2) * 2 + 0.7**2 + 0.1**2) / 4) ** 0.5)
    assert found.clipped == (0.75, 0.5)
    red, green = torch.tensor([0, 0, 255, 51]) / 255, torch.tensor([0, 0, 127, 25]) / 255
    apart = (red - green) / 2  # of each from their mean, grey
    assert found.chroma == pytest.approx(apart.std(correction=0).item())


def test_many_images_are_sampled_all_over(monkeypatch):
    monkeypatch.setattr(colours, "LOOKED_AT", 4)
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1) * 17
    found = pixels_of(StoredImages(images, torch.zeros(16, dtype=torch.int64)))
    assert found.mean == pytest.approx(((0 + 4 + 8 + 12) / 4 * 17 / 255,))


def dreams(mean=(0.5, 0.4, 0.4), std=(0.2, 0.2, 0.2), chroma=0.1, clipped=(0.3, 0.2, 0.1)):
    return Pixels(mean, std, chroma, clipped)


TRAINING = TrainingPixels((0.5, 0.4, 0.4), (0.2, 0.2, 0.2), 0.1, 0.1)


def test_dreams_that_are_like_training_images_are_not_doubted():
    alike = dreams(mean=(0.45, 0.45, 0.45), std=(0.25, 0.2, 0.16), chroma=0.12)
    assert doubts(alike, TRAINING) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dreams(mean=(0.5, 0.2, 0.5)), "mean is (0.50, 0.20, 0.50), where the network's first"),
        (dreams(mean=(0.5, 0.2, 0.5)), "layer tells (0.50, 0.40, 0.40) of training images"),
        (dreams(chroma=0.19), "are 1.9 times as far from grey"),
        (dreams(chroma=0.05), "are 0.5 times as far from grey"),
        (dreams(std=(0.4, 0.4, 0.28)), "spread 1.8 times as wide"),
        (dreams(std=(0.4, 0.4, 0.28)), "20 % of them are at 0 or 255"),
        (dreams(std=(0.1, 0.1, 0.1)), "spread 0.5 times as wide"),
    ],
)
def test_what_is_far_off_is_said(other, said):
    (doubt,) = doubts(other, TRAINING)
    assert said in doubt


def test_contrast_by_hand():
    assert contrast(dreams(std=(0.4, 0.4, 0.28)), TRAINING) == pytest.approx(1.8)


def test_a_report_has_them(toys, draws):
    teacher = toys.teacher(made(draws), card=toys.card((3, 16, 16)))
    trained_on(teacher.model, pixels(draws), teacher.card)
    log, white = MemoryLog(), torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    report_colours(StoredImages(white, torch.zeros(2, dtype=torch.int64)), teacher, log)
    assert log.metrics["synthesis.clipped"] == 1
    assert log.metrics["synthesis.contrast"] == 0
    assert log.metrics["synthesis.chroma"] == 0
    assert [note.partition(":")[0] for note in log.notes] == ["colours", "colours", "contrast"]
    _, (own, training) = pixel_rows({"details": log.details})
    assert own[1:] == [
        "1.000, 1.000, 1.000",
        "0.000, 0.000, 0.000",
        "0.000",
        "100.0 %, 100.0 %, 100.0 %",
    ]
    assert training[0] == "training images, by the first layer"
    assert training[4] == "-"


def test_a_teacher_without_batch_norm_has_the_dreams_alone(toys):
    log, grey = MemoryLog(), torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    images = StoredImages(grey, torch.zeros(2, dtype=torch.int64))
    report_colours(images, toys.teacher(toys.plain()), log)
    assert log.metrics == {"synthesis.clipped": 0.0}
    assert log.notes == []
    _, rows = pixel_rows({"details": log.details})
    assert len(rows) == 1
