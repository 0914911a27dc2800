"""Distillation, BatchNorm recalibration, and walking through images."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import frozen, seeded
from dreamkit.training.augmentation import drawn_share
from dreamkit.training.augmenter import Augmentation, Augmenter, Mixed
from dreamkit.training.batches import Draws, NormalisedBatches, in_order
from dreamkit.training.bn_recalibration import recalibrate
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.training.layout import overruns
from dreamkit.training.losses.distillation import (
    KLDivergence,
    LogitDistance,
    distillation_loss,
    mixed_cross_entropy,
)
from dreamkit.training.schedule import lr_factor
from dreamkit.types import NO_LABEL, StoredImages

CPU = torch.device("cpu")


def taught(epochs=30, temperature=3.0, **changes):
    """Return options of the softmax alone, in float32, whatever this processor multiplies."""
    alone = {"precision": "float32", "soft_loss": KLDivergence(), "features": 0.0}
    alone |= {"clip_norm": None}
    return Distillation(**(alone | {"epochs": epochs, "temperature": temperature} | changes))


def distiller(toys, student, teacher, images, options, seed=0):
    total = options.total_steps(len(images))
    return Distiller(student, teacher, toys.card(), options, CPU, seed, total)


def train(toys, student, teacher, images, options, seed=0):
    with frozen(teacher), seeded(seed):
        made = distiller(toys, student, teacher, images, options, seed)
        draws = Draws(options.batch_size, torch.Generator().manual_seed(seed))
        draws.add(len(images))
        losses = []
        while made.done < made.total:
            losses.append(float(made.step(images.batch(draws.next()))))
        made.finish([images])
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
    losses = train(toys, student, teacher, toys.images(16), taught(20, lr=0.05, batch_size=8))
    toys.assert_same_state(teacher, before)
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert not any(module.training for module in student.modules())


def test_distil_is_a_function_of_its_generator(toys):
    options = taught(2, lr=0.05, batch_size=4)
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
    options = taught(1, 2.0, lr=0.1, batch_size=4, momentum=0, weight_decay=0, warmup=0)
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
    train(toys, student, toys.two_bn(), toys.images(8), taught(2, batch_size=4))
    assert torch.equal(student.conv1.weight, before)
    assert not torch.equal(student.fc.weight, -toys.two_bn().fc.weight)


def test_clip_norm_limits_the_step(toys):
    student = toys.two_bn()
    with torch.no_grad():
        student.fc.weight.mul_(-30)
    before = [p.detach().clone() for p in student.parameters()]
    options = taught(1, lr=1, batch_size=8, momentum=0, weight_decay=0, warmup=0, clip_norm=0.01)
    train(toys, student, toys.two_bn(), toys.images(8), options)
    pairs = zip(student.parameters(), before, strict=True)
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in pairs))
    assert moved == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs", "expected"),
    [
        (8, 4, 3, 6),
        (9, 4, 3, 7),  # 27 images in fours, the last three left out
        (10, 4, 3, 8),  # 30 images: 7.5, and Python rounds to even
        (3, 4, 2, 2),  # all there is, twice
        (1, 4, 2, 2),
        (8, 4, 0, 0),
    ],
)
def test_steps_of_epochs_by_hand(images, batch_size, epochs, expected):
    assert taught(epochs, batch_size=batch_size).total_steps(images) == expected


def test_steps_in_place_of_epochs(toys):
    options = taught(3, lr=1e-3, batch_size=4, steps=5)
    losses = train(toys, toys.two_bn(), toys.two_bn(), toys.images(8), options)
    assert len(losses) == 5


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "expected"),
    [
        ("step", 0, 3, 1.0),
        ("step", 0, 4, 0.1),
        ("step", 0, 8, 0.01),
        ("constant", 0, 0, 1.0),
        ("constant", 0, 9, 1.0),
        ("constant", 3, 0, 1 / 4),
        ("constant", 3, 2, 3 / 4),
        ("constant", 3, 3, 1.0),
        ("cosine", 0, 0, 1.0),  # ½(1 + cos 0)
        ("cosine", 0, 5, 0.5),  # ½(1 + cos ½π)
        ("cosine", 2, 0, 1 / 3),
        ("cosine", 2, 1, 2 / 3),
        ("cosine", 2, 2, 1.0),
        ("cosine", 2, 6, 0.5),  # 4 of the 8 steps after the warm-up
        ("cosine", 2, 4, 0.5 * (1 + 2**-0.5)),  # 2 of 8: ½(1 + cos ¼π)
    ],
)
def test_learning_rate_factor(schedule, warmup, step, expected):
    assert lr_factor(step, 10, warmup, schedule, (0.4, 0.8)) == pytest.approx(expected)


def test_learning_rate_follows_the_schedule(toys, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def watch(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watch)
    options = taught(4, lr=0.2, batch_size=4, warmup=0.25)
    train(toys, toys.two_bn(), toys.two_bn(), toys.images(8), options)
    # 8 steps, 2 of them warm-up: 1/3, 2/3, then half a cosine over 6.
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([0.2 * f for f in (1 / 3, 2 / 3, *cosine)])


def test_parts_of_a_batch_add_up_to_it_where_batch_norm_does_not_tell_them_apart(toys):
    # In eval mode BatchNorm treats images one by one, so that the gradient is that of the whole.
    students = [toys.plain(), toys.plain()]
    for student, parts in zip(students, (1, 4), strict=True):
        options = taught(1, lr=0.1, batch_size=8, accumulate=parts, momentum=0)
        train(toys, student, toys.two_bn(), toys.images(8), options)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(students[0].fc.weight, toys.plain().fc.weight)


def test_parts_that_leave_batch_norm_one_image_are_refused():
    with pytest.raises(ValueError, match="accumulate: 3 parts of 4"):
        Distillation(batch_size=4, accumulate=3)


def test_hard_labels_by_hand(toys):
    teacher, student, twin = toys.two_bn(), toys.plain(), toys.plain()
    options = taught(1, 2.0, lr=0.1, batch_size=4, warmup=0, hard_labels=0.25)
    images = toys.images(4)
    (loss,) = train(toys, student, teacher, images, options)
    x = toys.card().normalise(images.images)
    soft = distillation_loss(twin(x), teacher(x), 2.0)
    hard = nn.functional.cross_entropy(twin(x), images.labels)
    assert loss == pytest.approx((0.75 * soft + 0.25 * hard).item(), rel=1e-4)


def test_distance_of_the_logits_by_hand():
    # |1 - 3|, |0 + 1|, |2 - 2|, |5 - 4|: four classes in all, so the mean is 1.
    student = torch.tensor([[1.0, 0], [2, 5]], requires_grad=True)
    loss = LogitDistance()(student, torch.tensor([[3.0, -1], [2, 4]]), 1.0)
    assert loss.item() == 1
    loss.backward()
    assert student.grad.tolist() == [[-0.25, 0.25], [0, 0.25]]


def test_l1_teaches_by_the_logits_and_has_no_temperature(toys):
    losses = []
    for temperature in (1.0, 5.0):
        student, twin = toys.plain(), toys.plain()
        options = taught(1, temperature, lr=0.1, batch_size=4, warmup=0, soft_loss=LogitDistance())
        images = toys.images(4)
        losses += train(toys, student, toys.two_bn(), images, options)
        x = toys.card().normalise(images.images)
        expected = LogitDistance()(twin(x), toys.two_bn()(x), temperature).item()
        assert losses[-1] == pytest.approx(expected, rel=1e-4)
    assert losses[0] == losses[1]


def test_hard_labels_of_images_without_labels_are_refused(toys):
    images = StoredImages(toys.images(4).images, torch.full((4,), NO_LABEL))
    options = taught(1, batch_size=4, hard_labels=0.5)
    with pytest.raises(DreamkitError, match="no labels") as caught:
        train(toys, toys.plain(), toys.two_bn(), images, options)
    assert caught.value.path == ("hard_labels",)


def test_the_average_of_the_weights_is_the_student_that_is_left(toys):
    student, plain = toys.plain(), toys.plain()
    path = [toys.plain().fc.bias.detach().clone()]
    with frozen(toys.two_bn()) as _, seeded(0):
        made = distiller(toys, plain, toys.two_bn(), toys.images(8), taught(3, batch_size=4))
        draws = Draws(4, torch.Generator().manual_seed(0))
        draws.add(8)
        for _ in range(6):
            made.step(toys.images(8).batch(draws.next()))
            path.append(plain.fc.bias.detach().clone())
    train(toys, student, toys.two_bn(), toys.images(8), taught(3, batch_size=4, ema=0.5))
    average = path[1]  # the first update copies
    for weights in path[2:]:
        average = 0.5 * average + 0.5 * weights
    torch.testing.assert_close(student.fc.bias, average)


def test_adamw_moves_each_weight_by_the_learning_rate_at_first(toys):
    student = toys.plain()
    options = taught(1, lr=1e-3, batch_size=8, optimizer="adamw", weight_decay=0, warmup=0)
    train(toys, student, toys.two_bn(), toys.images(8), options)
    moved = (student.fc.weight - toys.plain().fc.weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=1e-6)


def test_a_divergence_names_what_to_change(toys):
    options = taught(20, lr=1e30, batch_size=4, warmup=0)
    with pytest.raises(DreamkitError, match="not finite") as caught:
        train(toys, toys.plain(), toys.two_bn(), toys.images(8), options)
    assert caught.value.path == ("lr",)


def test_statistics_are_taken_anew_where_that_is_asked_for(toys):
    student = toys.two_bn()
    images = toys.images(8)
    options = taught(
        1, lr=1e-9, batch_size=4, statistics="recalibrate", statistics_batches=2, weight_decay=0
    )
    train(toys, student, toys.two_bn(), images, options)
    seen = student.conv1(toys.card().normalise(images.images))
    torch.testing.assert_close(student.bn1.running_mean, seen.mean((0, 2, 3)))


def test_the_first_step_of_sgd_with_and_without_nesterov(toys):
    # Momentum 0.9 alone takes the gradient; Nesterov's looks ahead by nine tenths of it.
    images, moved = toys.images(8), []
    for nesterov in (False, True):
        student = toys.plain()
        before = student.conv1.weight.detach().clone()
        options = taught(1, batch_size=8, weight_decay=0, warmup=0, nesterov=nesterov)
        made = distiller(toys, student, toys.two_bn(), images, options)
        made.step((images.images, images.labels))
        moved.append(student.conv1.weight.detach() - before)
    torch.testing.assert_close(moved[1], 1.9 * moved[0], rtol=1e-4, atol=1e-7)


def test_a_compiler_that_fails_leaves_training_eager_and_says_so(toys, monkeypatch):
    def compile(function, **settings):
        def compiled(*arguments):
            raise RuntimeError("no compiler here\nand a long story")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    notes = []
    options = taught(1, batch_size=4, compile=True)
    made = Distiller(toys.plain(), toys.two_bn(), toys.card(), options, CPU, 0, 2, notes.append)
    images = toys.images(8)
    assert made.step((images.images[:4], images.labels[:4])).isfinite()
    assert made.step((images.images[4:], images.labels[4:])).isfinite()
    (note,) = notes
    assert "without compilation" in note
    assert "no compiler here" in note
    assert "story" not in note


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"optimizer": "adamw", "lr": 1e-3},
        {"precision": "bfloat16"},  # weights and momenta are laid out with channels last
        {"precision": "bfloat16", "optimizer": "adamw", "lr": 1e-3},
    ],
)
def test_training_in_two_parts_ends_where_one_does(toys, changes):
    settings = {"batch_size": 4, "augmentation": Augmentation(crop=1, flip=True, mixup=0.5)}
    options, images = taught(3, **(settings | changes)), toys.images(8)
    whole, parts = toys.two_bn(), toys.two_bn()
    for student in (whole, parts):
        with torch.no_grad():
            student.fc.weight.mul_(-1)
    train(toys, whole, toys.two_bn(), images, options)

    teacher = toys.two_bn()
    with frozen(teacher):
        first = distiller(toys, parts, teacher, images, options)
        draws = Draws(4, torch.Generator().manual_seed(0))
        draws.add(8)
        for _ in range(3):
            first.step(images.batch(draws.next()))
        # As a checkpoint holds them.
        kept = {k: v.contiguous().clone() for k, v in prefixed("made", first.state()).items()}
        dealt = {k: v.clone() for k, v in draws.state().items()}
        for _ in range(2):  # what is lost
            first.step(images.batch(draws.next()))
        second = distiller(toys, parts, teacher, images, options)
        second.restore(below("made", kept))
        draws = Draws(4, torch.Generator())
        draws.restore(dealt)
        assert second.done == 3
        while second.done < second.total:
            second.step(images.batch(draws.next()))
        second.finish([images])
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


# --- varied images ----------------------------------------------------------------------------


def augmenter(seed=0, **options):
    return Augmenter(Augmentation(**options), seed)


def test_without_augmentation_images_stay_as_they_are(toys):
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed = augmenter()(images, labels)
    assert mixed.images is images
    assert torch.equal(mixed.labels, labels)
    assert mixed.share.tolist() == [1] * 4


def test_mixup_by_its_own_share(toys):
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    mixed = augmenter(mixup=1.0)(images, labels)
    share = float(mixed.share[0])
    assert mixed.share.tolist() == [share] * 6
    assert 0 < share < 1
    expected = share * images + (1 - share) * images[mixed.others]
    torch.testing.assert_close(mixed.images, expected)


def test_cutmix_pastes_a_rectangle_of_another_image_and_says_how_much_is_left():
    count, side = 400, 8
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 2, side, side)
    mixed = augmenter(cutmix=0.5)(images, torch.arange(count) % 10)
    pasted = mixed.images != images
    assert torch.equal(pasted[:, 0], pasted[:, 1])
    of_others = torch.where(pasted, mixed.images, 0).amax((1, 2, 3))
    assert torch.equal(torch.where(pasted, of_others.view(-1, 1, 1, 1), images), mixed.images)
    some = pasted.any(1).any(1).any(1)
    assert torch.equal(mixed.others[some], of_others[some].long() % 10), "labels of the others"
    rows, columns = pasted[:, 0].any(2).sum(1), pasted[:, 0].any(1).sum(1)
    assert torch.equal(pasted[:, 0].sum((1, 2)), rows * columns), "a rectangle"
    torch.testing.assert_close(mixed.share[some], (1 - rows * columns / side**2)[some])
    sides = torch.cat([rows, columns])[torch.cat([rows, columns]) > 0]
    assert set(sides.tolist()) == {2, 3, 4, 5, 6}
    # 400 draws of ½, ± 5 standard deviations; some images are given a part of themselves.
    assert (mixed.share < 1).float().mean().item() == pytest.approx(0.5, abs=0.13)
    assert torch.equal(augmenter(cutmix=0.5)(images, mixed.labels).images, mixed.images)
    assert torch.equal(augmenter(1, cutmix=0.0)(images, mixed.labels).images, images)


def test_colours_are_shifted_for_each_image_and_channel_before_its_border_is_filled():
    images = torch.randn(50, 3, 8, 8)
    shifted = augmenter(colour_shift=0.5)(images, torch.arange(50)).images
    flat, found = images.flatten(2), shifted.flatten(2)
    scale = found.std(2) / flat.std(2)
    offset = scale * flat.mean(2) - found.mean(2)
    torch.testing.assert_close(found, scale[..., None] * flat - offset[..., None])
    for drawn in (scale.log(), offset):
        assert drawn.abs().max() <= 0.5 + 1e-5
        assert drawn.unique().numel() > 140  # of 150
        assert drawn.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.2)
    zeros = augmenter(colour_shift=0.5, crop=2)(images, torch.arange(50)).images
    assert (zeros == 0).sum() > 50 * 3 * 8
    assert torch.equal(augmenter(1, colour_shift=0.0)(images, torch.arange(50)).images, images)


def test_images_are_mixed_in_one_way():
    with pytest.raises(OptionError, match="mixed by mixup already") as caught:
        Augmentation(mixup=1.0, cutmix=0.5)
    assert caught.value.option == "cutmix"


def test_shares_follow_the_beta_distribution():
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([drawn_share(0.5, generator) for _ in range(4000)])
    # Beta(½, ½) has mean ½ and variance 1/8; ± 5 standard deviations of the estimates.
    assert shares.mean().item() == pytest.approx(0.5, abs=0.028)
    assert shares.var().item() == pytest.approx(0.125, abs=0.01)


def test_cross_entropy_to_mixed_labels_by_hand():
    logits = torch.tensor([[math.log(3), 0.0]])
    labels, others = torch.tensor([0, 1]), torch.tensor([1, 1])
    share = torch.tensor([0.75, 1.0])
    mixed = Mixed(torch.zeros(2, 1, 1, 1), labels, others, share)
    # -¾ ln ¾ - ¼ ln ¼, and -ln ¼
    first = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = (first - math.log(0.25)) / 2
    found = mixed_cross_entropy(logits.expand(2, 2), mixed).item()
    assert found == pytest.approx(expected, rel=1e-5)


# --- batches ----------------------------------------------------------------------------------


def test_in_order(toys):
    images = toys.images(7)
    batches = list(in_order(images, 3))
    assert [len(stored) for stored, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([stored for stored, _ in batches]), images.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert list(in_order(toys.images(0), 3)) == []


def drawn_from(size, batch_size=4, seed=0):
    draws = Draws(batch_size, torch.Generator().manual_seed(seed))
    draws.add(size)
    return draws


def test_every_image_comes_once_before_any_comes_again():
    draws = drawn_from(10)
    dealt = [draws.next() for _ in range(5)]
    assert [len(batch) for batch in dealt] == [4] * 5
    flat = [index for batch in dealt for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != list(range(10))


def test_a_set_smaller_than_a_batch_is_dealt_whole():
    draws = drawn_from(3)
    assert sorted(draws.next()) == [0, 1, 2]
    assert sorted(draws.next()) == [0, 1, 2]


def test_what_is_added_comes_next():
    draws = drawn_from(8)
    draws.next()
    draws.add(4)
    assert sorted(draws.next()) == [8, 9, 10, 11]
    rest = draws.next()
    assert max(rest) < 8
    assert len({*draws.next(), *draws.next(), *draws.next()}) == 12


def test_dealing_goes_on_from_a_state():
    draws = drawn_from(10)
    draws.next()
    state = {k: v.clone() for k, v in draws.state().items()}
    expected = [draws.next() for _ in range(6)]
    other = Draws(4, torch.Generator())
    other.restore(state)
    assert [other.next() for _ in range(6)] == expected


def numbered(count):
    return StoredImages(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


# --- recalibration ----------------------------------------------------------------------------


def population(rows):
    """Return mean and biased variance over everything but the channels, in float64."""
    flat = rows.double().transpose(0, 1).reshape(rows.shape[1], -1)
    return flat.mean(1), flat.var(1, correction=0)


def batches(toys, images, batch_size, most=None):
    return NormalisedBatches(images, toys.card(), CPU, batch_size, most)


def assert_statistics(bn, rows):
    mean, var = population(rows)
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-4, atol=1e-5)


def test_one_batch_gives_every_layer_the_population_statistics(toys):
    model, images = toys.two_bn(), toys.images(6)
    twin = toys.two_bn().double()
    recalibrate(model, batches(toys, images, 6))
    first = twin.conv1(toys.card().normalise(images.images).double())
    assert_statistics(model.bn1, first)
    mean, var = population(first)
    x = (first - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + twin.bn1.eps).sqrt()
    x = x * twin.bn1.weight.view(1, -1, 1, 1) + twin.bn1.bias.view(1, -1, 1, 1)
    assert_statistics(model.bn2, twin.conv2(x.relu()))


def test_uneven_batches_are_weighted_by_their_size(toys):
    # 8 images in batches of 3, 3 and 2: the first layer's statistics are those of all 8.
    model, images = toys.two_bn(), toys.images(8)
    recalibrate(model, batches(toys, images, 3))
    assert_statistics(model.bn1, toys.two_bn().conv1(toys.card().normalise(images.images)))


def test_no_more_batches_than_asked_for(toys):
    model, images = toys.two_bn(), toys.images(9)
    recalibrate(model, batches(toys, images, 3, most=2))
    seen = toys.card().normalise(images.images[:6])
    assert_statistics(model.bn1, toys.two_bn().conv1(seen))


def test_only_buffers_change(toys):
    model = toys.two_bn()
    model.bn1.train()
    model.conv1.weight.requires_grad_(False)
    model.bn1.momentum = 0.37
    before = toys.state(model)
    recalibrate(model, batches(toys, toys.images(6), 3))
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
    recalibrate(model, batches(toys, toys.images(4), 2))
    toys.assert_same_state(model, before)


def test_a_failing_forward_pass_leaves_the_model_as_it_was(toys):
    model = toys.two_bn()
    model.bn1.momentum = 0.37
    before = toys.state(model)
    grey = toys.card(size=(1, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate(model, NormalisedBatches(toys.images(4, size=(1, 8, 8)), grey, CPU, 2))
    toys.assert_same_state(model, before)
    assert model.bn1.momentum == 0.37


def test_dropout_is_off_while_statistics_are_taken(toys):
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    images = toys.images(6)
    recalibrate(model, batches(toys, images, 6))
    assert_statistics(model[1], toys.card().normalise(images.images))


@pytest.mark.parametrize(("images", "batch_size"), [(1, 4), (3, 1)])
def test_layers_of_single_rows_keep_their_statistics(toys, images, batch_size):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.bn_last = toys.two_bn(), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn_last(self.body(x))

    model = toys.fill(Head())
    last, first = model.bn_last.running_var.clone(), model.body.bn1.running_var.clone()
    recalibrate(model, batches(toys, toys.images(images), batch_size))
    assert torch.equal(model.bn_last.running_var, last)
    assert not torch.equal(model.body.bn1.running_var, first), "of 8×8 values there is a variance"


def test_a_last_batch_of_one_image_with_single_features(toys):
    # BatchNorm on 1×1 features has no variance of one image, and torch refuses it in training.
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)).eval()
    toys.fill(model)
    images = toys.images(5)
    model[2].momentum = 0.37
    recalibrate(model, batches(toys, images, 2))
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
    recalibrate(model, batches(toys, images, 4))
    assert (model[1].running_var >= 0).all()
    assert torch.isfinite(model(toys.card().normalise(images.images))).all()


def test_a_block_with_a_seed_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    with seeded(5):
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_reaches_cuda_only_where_it_is_in_use(monkeypatch):
    seeds, kept, drawn = [], [], []

    @contextlib.contextmanager
    def fork(devices):
        before = torch.get_rng_state()
        kept.append(list(devices))
        yield
        torch.set_rng_state(before)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    for device in (None, torch.device("cpu"), torch.device("cuda", 0)):
        with seeded(5, device):
            drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 1
    assert kept == [[], [], [0, 1]]
    assert seeds == [5]


def test_channels_stay_first_where_a_thin_shortcut_would_spoil_memory():
    thin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, 2))
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 1, 2))
    square = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2), nn.Conv2d(6, 4, 1))
    assert [overruns(model, CPU) for model in (thin, wide, square)] == [True, False, False]
    assert not overruns(thin, torch.device("cuda"))
