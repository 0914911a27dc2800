"""Distillation, BatchNorm recalibration, and walking through images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dreamkit.training.batches import epochs_of, in_order
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.training.distillation import Distillation, distil, warmup_cosine
from dreamkit.training.losses import distillation_loss
from dreamkit.types import StoredImages

CPU = torch.device("cpu")


def train(toys, student, teacher, images, options, seed=0):
    losses = []

    def on_step(done, loss):
        assert done == len(losses) + 1
        losses.append(loss)

    generator = torch.Generator().manual_seed(seed)
    distil(student, teacher, images, toys.card(), options, CPU, generator, on_step)
    return losses


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_distillation_loss_by_hand(tau):
    # Teacher logits (τ ln 3, 0) are (¾, ¼) at temperature τ, the student's (0, 0) are (½, ½):
    # KL(p_T ‖ p_S) = ¾ ln 1½ + ¼ ln ½, times τ². The second image agrees: the mean is half.
    teacher = torch.tensor([[tau * math.log(3), 0], [1.0, 2]])
    student = torch.tensor([[0.0, 0], [1.0, 2]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = distillation_loss(student, teacher, tau)
    assert loss.item() == pytest.approx(tau**2 * kl / 2, rel=1e-5)


def test_distillation_loss_is_not_symmetric():
    # KL of (½, ½) from (¾, ¼): ½ ln ⅔ + ½ ln 2.
    loss = distillation_loss(torch.tensor([[math.log(3), 0]]), torch.zeros(1, 2), 1.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-5)


def test_gradient_keeps_its_scale_with_the_temperature():
    # For small logits the gradient tends to (p_S - p_T)-like terms that do not depend on τ.
    gradients = []
    for tau in (1.0, 20.0):
        student = torch.tensor([[0.01, -0.01]], requires_grad=True)
        distillation_loss(student, torch.tensor([[-0.01, 0.01]]), tau).backward()
        gradients.append(student.grad[0, 0].item())
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-2)


# --- distil -----------------------------------------------------------------------------------


def test_distil_teaches_and_leaves_the_teacher_alone(toys):
    teacher, student = toys.two_bn(), toys.two_bn()
    teacher.train()
    teacher.bn2.eval()
    teacher.conv1.weight.requires_grad_(False)
    with torch.no_grad():
        student.fc.weight.mul_(-3)
    before = toys.state(teacher)
    losses = train(toys, student, teacher, toys.images(16), Distillation(20, lr=0.05, batch_size=8))
    toys.assert_same_state(teacher, before)
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert not any(module.training for module in student.modules())


def test_distil_is_a_function_of_its_generator(toys):
    options = Distillation(2, lr=0.05, batch_size=4)
    students = [toys.two_bn() for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        with torch.no_grad():
            student.fc.weight.mul_(-1)
        torch.manual_seed(id(student) % 1000)  # the global generator has no say
        train(toys, student, toys.two_bn(), toys.images(12), options, seed)
    assert torch.equal(students[0].fc.weight, students[1].fc.weight)
    assert not torch.equal(students[0].fc.weight, students[2].fc.weight)


def test_first_step_by_hand(toys):
    # Without momentum and decay one step is w - lr·∂L/∂w, where BatchNorm is in training mode.
    teacher, student, twin = toys.two_bn(), toys.two_bn(), toys.two_bn()
    for model in (student, twin):
        with torch.no_grad():
            model.fc.weight.mul_(-1)
    options = Distillation(1, 2.0, lr=0.1, batch_size=4, momentum=0, weight_decay=0, warmup=0)
    images = toys.images(4)
    (loss,) = train(toys, student, teacher, images, options)
    x = toys.card().normalise(images.images)
    twin.train()
    expected = distillation_loss(twin(x), teacher(x), 2.0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    moved = twin.fc.weight - 0.1 * twin.fc.weight.grad
    torch.testing.assert_close(student.fc.weight, moved, rtol=1e-4, atol=1e-6)


def test_frozen_weights_of_the_student_stay(toys):
    student = toys.two_bn()
    student.conv1.weight.requires_grad_(False)
    with torch.no_grad():
        student.fc.weight.mul_(-1)
    before = student.conv1.weight.clone()
    train(toys, student, toys.two_bn(), toys.images(8), Distillation(2, batch_size=4))
    assert torch.equal(student.conv1.weight, before)
    assert not torch.equal(student.fc.weight, -toys.two_bn().fc.weight)


def test_clip_norm_limits_the_step(toys):
    student = toys.two_bn()
    with torch.no_grad():
        student.fc.weight.mul_(-30)
    before = [p.detach().clone() for p in student.parameters()]
    options = Distillation(
        1, lr=1, batch_size=8, momentum=0, weight_decay=0, warmup=0, clip_norm=0.01
    )
    train(toys, student, toys.two_bn(), toys.images(8), options)
    pairs = zip(student.parameters(), before, strict=True)
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in pairs))
    assert moved == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs", "expected"),
    [
        (8, 4, 3, 6),
        (9, 4, 3, 6),  # a last batch of one is left out
        (10, 4, 3, 9),
        (3, 4, 2, 2),
        (1, 4, 2, 2),  # all there is
        (8, 4, 0, 0),
    ],
)
def test_steps_is_how_often_on_step_is_called(toys, images, batch_size, epochs, expected):
    options = Distillation(epochs, lr=1e-3, batch_size=batch_size)
    losses = train(toys, toys.two_bn(), toys.two_bn(), toys.images(images), options)
    assert options.steps(images) == expected
    assert len(losses) == expected


def test_no_images_no_steps(toys):
    assert Distillation(3).steps(0) == 0
    assert train(toys, toys.two_bn(), toys.two_bn(), toys.images(0), Distillation(3)) == []


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 5),  # up in four steps
        (3, 4 / 5),
        (4, 1.0),
        (7, 0.5 * (1 + math.cos(math.pi * 3 / 12))),
        (10, 0.5),  # halfway through the twelve that are left
        (13, 0.5 * (1 + math.cos(math.pi * 9 / 12))),
    ],
)
def test_warmup_cosine(step, expected):
    assert warmup_cosine(step, 16, 4) == pytest.approx(expected)


def test_learning_rate_follows_the_schedule(toys, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def watch(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watch)
    options = Distillation(4, lr=0.2, batch_size=4, warmup=0.25)
    train(toys, toys.two_bn(), toys.two_bn(), toys.images(8), options)
    # 8 steps, 2 of them warm-up: 1/3, 2/3, then half a cosine over 6.
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([0.2 * f for f in (1 / 3, 2 / 3, *cosine)])


# --- batches ----------------------------------------------------------------------------------


def test_in_order(toys):
    images = toys.images(7)
    batches = list(in_order(images, 3))
    assert [len(stored) for stored, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([stored for stored, _ in batches]), images.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert list(in_order(toys.images(0), 3)) == []


def numbered(count):
    return StoredImages(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


def test_epochs_see_every_image_once_each_in_other_orders():
    generator = torch.Generator().manual_seed(0)
    labels = [y for _, y in epochs_of(numbered(10), 4, 2, generator)]
    assert [len(y) for y in labels] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(labels[:3]).tolist(), torch.cat(labels[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("count", "sizes"), [(9, [4, 4]), (5, [4]), (1, [1]), (0, [])], ids=lambda v: str(v)
)
def test_a_last_batch_of_one_is_left_out(count, sizes):
    batches = epochs_of(numbered(count), 4, 1, torch.Generator())
    assert [len(labels) for _, labels in batches] == sizes


# --- recalibration ----------------------------------------------------------------------------


def population(rows):
    """Return mean and biased variance over everything but the channels, in float64."""
    flat = rows.double().transpose(0, 1).reshape(rows.shape[1], -1)
    return flat.mean(1), flat.var(1, correction=0)


def assert_statistics(bn, rows):
    mean, var = population(rows)
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-4, atol=1e-5)


def test_one_batch_gives_every_layer_the_population_statistics(toys):
    model, images = toys.two_bn(), toys.images(6)
    twin = toys.two_bn().double()
    recalibrate(model, images, toys.card(), CPU, batches=1, batch_size=6)
    first = twin.conv1(toys.card().normalise(images.images).double())
    assert_statistics(model.bn1, first)
    mean, var = population(first)
    x = (first - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + twin.bn1.eps).sqrt()
    x = x * twin.bn1.weight.view(1, -1, 1, 1) + twin.bn1.bias.view(1, -1, 1, 1)
    assert_statistics(model.bn2, twin.conv2(x.relu()))


def test_uneven_batches_are_weighted_by_their_size(toys):
    # 8 images in batches of 3, 3 and 2: the first layer's statistics are those of all 8.
    model, images = toys.two_bn(), toys.images(8)
    recalibrate(model, images, toys.card(), CPU, batches=9, batch_size=3)
    assert_statistics(model.bn1, toys.two_bn().conv1(toys.card().normalise(images.images)))


def test_no_more_batches_than_asked_for(toys):
    model, images = toys.two_bn(), toys.images(9)
    recalibrate(model, images, toys.card(), CPU, batches=2, batch_size=3)
    seen = toys.card().normalise(images.images[:6])
    assert_statistics(model.bn1, toys.two_bn().conv1(seen))


def test_only_buffers_change(toys):
    model = toys.two_bn()
    model.bn1.train()
    model.conv1.weight.requires_grad_(False)
    model.bn1.momentum = 0.37
    before = toys.state(model)
    recalibrate(model, toys.images(6), toys.card(), CPU, 2, 3)
    after = toys.state(model)
    assert after.keys() == before.keys()
    for part in ("gradients", "identities", "modes", "hooks"):
        assert after[part] == before[part]
    changed = {
        name
        for name, tensor in before["tensors"].items()
        if not torch.equal(tensor, after["tensors"][name])
    }
    statistics = {f"{bn}.running_{of}" for bn in ("bn1", "bn2") for of in ("mean", "var")}
    assert statistics <= changed
    assert {name.rpartition(".")[2] for name in changed} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert model.bn1.momentum == 0.37


def test_without_batch_norm_nothing_happens(toys):
    model = toys.plain()
    before = toys.state(model)
    recalibrate(model, toys.images(4), toys.card(), CPU, 2, 2)
    toys.assert_same_state(model, before)


def test_a_failing_forward_pass_leaves_the_model_as_it_was(toys):
    model = toys.two_bn()
    model.bn1.momentum = 0.37
    before = toys.state(model)
    grey = toys.card(size=(1, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate(model, toys.images(4, size=(1, 8, 8)), grey, CPU, 2, 2)
    toys.assert_same_state(model, before)
    assert model.bn1.momentum == 0.37


def test_dropout_is_off_while_statistics_are_taken(toys):
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    images = toys.images(6)
    recalibrate(model, images, toys.card(), CPU, 1, 6)
    assert_statistics(model[1], toys.card().normalise(images.images))


def test_a_last_batch_of_one_image_with_single_features(toys):
    # BatchNorm on 1×1 features has no variance of one image, and torch refuses it in training.
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)).eval()
    toys.fill(model)
    images = toys.images(5)
    model[2].momentum = 0.37
    recalibrate(model, images, toys.card(), CPU, batches=9, batch_size=2)
    assert model[2].momentum == 0.37
    assert len(model[2]._forward_pre_hooks) == 0
    assert torch.isfinite(model[2].running_var).all()


def test_a_channel_that_hardly_varies_gets_no_negative_variance(toys):
    # Means of 10 and variances of 1e-6: in float32 E[x²] is 100 ± 4e-6, so that E[x²] - E[x]² may
    # be below zero, and below -eps = -1e-5 every output is NaN.
    conv = nn.Conv2d(3, 64, 1)
    with torch.no_grad():
        conv.weight.copy_(1e-3 * torch.sin(torch.arange(192.0)).view(64, 3, 1, 1))
        conv.bias.copy_(10 + torch.sin(torch.arange(64.0)))
    model = nn.Sequential(conv, nn.BatchNorm2d(64)).eval()
    images = toys.images(16)
    recalibrate(model, images, toys.card(), CPU, batches=9, batch_size=4)
    assert (model[1].running_var >= 0).all()
    assert torch.isfinite(model(toys.card().normalise(images.images))).all()
