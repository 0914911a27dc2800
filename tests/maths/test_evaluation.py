"""Accuracy, agreement and cost, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.evaluation.accuracy import accuracy, agreement, images_at_once, predict
from dreamkit.evaluation.cost import count
from dreamkit.types import StoredImages

CPU = torch.device("cpu")


class FirstPixel(nn.Module):
    """Predicts the class that the first pixel of an image holds, plus an offset."""

    def __init__(self, classes=3, offset=0):
        super().__init__()
        self.classes = classes
        self.offset = offset
        self.batches = []

    def forward(self, x):
        self.batches.append((len(x), self.training, torch.is_grad_enabled()))
        given = (x[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot((given + self.offset) % self.classes, self.classes).float()


@pytest.fixture
def card(toys):
    return toys.card(size=(1, 1, 1), mean=(0.0,), std=(1.0,))


def labelled(predicted, labels):
    pixels = torch.tensor(predicted, dtype=torch.uint8).view(-1, 1, 1, 1)
    return StoredImages(pixels, torch.tensor(labels))


def test_accuracy_by_hand(card):
    # Right are the first, third and fourth of five.
    images = labelled([0, 1, 2, 1, 0], [0, 2, 2, 1, 1])
    assert accuracy(FirstPixel(), images, card, CPU) == pytest.approx(3 / 5)


def test_accuracy_over_batches_counts_images_not_batches(card):
    # 300 images in batches of 256 and 44; wrong are the last 30: 270/300. The mean of the
    # batches' accuracies would be (1 + 14/44)/2 = 0.66.
    predicted = [1] * 300
    model = FirstPixel()
    images = labelled(predicted, [1] * 270 + [2] * 30)
    assert accuracy(model, images, card, CPU) == pytest.approx(0.9)
    assert [size for size, _, _ in model.batches] == [256, 44]


@pytest.mark.parametrize(
    ("size", "device", "count"),
    [
        ((1, 8, 8), "cpu", 256),
        ((3, 64, 64), "cpu", 256),
        ((3, 224, 224), "cpu", 32),
        ((3, 448, 224), "cpu", 16),
        ((3, 4096, 4096), "cpu", 1),
        ((3, 224, 224), "cuda", 256),
    ],
)
def test_few_large_images_go_through_a_network_at_once_on_a_cpu(size, device, count):
    assert images_at_once(size, torch.device(device)) == count


def test_predict_takes_them_in_such_parts(toys):
    model = FirstPixel()
    images = StoredImages(torch.ones(70, 1, 224, 224, dtype=torch.uint8), torch.ones(70))
    predicted, _ = predict(
        model, images, toys.card(size=(1, 224, 224), mean=(0.0,), std=(1.0,)), CPU
    )
    assert predicted.tolist() == [1] * 70
    assert [size for size, _, _ in model.batches] == [32, 32, 6]


def test_predict_keeps_the_order(card):
    predicted, labels = predict(FirstPixel(), labelled([2, 0, 1], [0, 1, 2]), card, CPU)
    assert predicted.tolist() == [2, 0, 1]
    assert labels.tolist() == [0, 1, 2]


def test_agreement_by_hand(card):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(x), 3)

    images = labelled([0, 1, 1, 2], [9, 9, 9, 9])  # labels are not used
    assert agreement(FirstPixel(), Constant(), images, card, CPU) == pytest.approx(2 / 4)
    assert agreement(FirstPixel(), FirstPixel(), images, card, CPU) == 1
    assert agreement(FirstPixel(), FirstPixel(offset=1), images, card, CPU) == 0


def test_outputs_that_are_not_finite_are_never_right_and_agree_with_nothing(card):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), float("nan"))

    images = labelled([0, 0, 1], [0, 0, 1])
    assert agreement(Broken(), FirstPixel(), images, card, CPU) == 0
    assert accuracy(Broken(), images, card, CPU) == 0


def test_modes_are_kept_and_no_gradients_are_made(toys, card):
    model = FirstPixel().train()
    images = labelled([0, 1], [0, 1])
    accuracy(model, images, card, CPU)
    assert model.training
    assert model.batches == [(2, False, False)]
    net = toys.two_bn().train()
    net.bn1.eval()
    before = toys.state(net)
    agreement(net, toys.residual(), toys.images(4), toys.card(), CPU)
    toys.assert_same_state(net, before)


def test_params_and_flops_of_a_convolution_and_a_linear_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 4 * 5, 6)
    )
    # 8×10 at stride 2 is 4×5. Convolution: 4·5 positions · 4 filters · 3·3·3 = 2,160
    # multiply-adds, 4·27 + 4 = 112 parameters. Linear: 80·6 = 480, 480 + 6 = 486 parameters.
    cost = count(model, (3, 8, 10))
    assert cost.params == 112 + 486
    assert cost.flops == 2160 + 480
    assert cost.uncounted == {}


def test_flops_of_grouped_convolutions():
    # Depthwise 8 channels 3×3 on 6×6: 36·8·9; pointwise 8→16: 36·8·16.
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 16, 1, bias=False)
    )
    cost = count(model, (8, 6, 6))
    assert cost.flops == 36 * 8 * 9 + 36 * 8 * 16
    assert cost.params == 72 + 128


def test_what_is_not_counted_is_listed():
    class Sines(nn.Module):
        def forward(self, x):
            return torch.sin(torch.sin(x)).mean((2, 3))

    cost = count(Sines(), (3, 4, 4))
    assert cost.flops == 0
    assert cost.uncounted["aten::sin"] == 2


def test_counting_leaves_the_model_as_it_was(toys):
    model = toys.two_bn().train()
    model.bn1.eval()
    before = toys.state(model)
    count(model, (3, 8, 8))
    toys.assert_same_state(model, before)
