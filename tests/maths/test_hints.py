"""Hints from a teacher's layers, on networks small enough to tell what they put out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.training.distillation import Distiller
from dreamkit.training.hints import Hints
from dreamkit.training.recovery import Recovery

CPU = torch.device("cpu")


def network(*weights: float) -> nn.Sequential:
    """Return a 1×1 convolution with these weights, and BatchNorm that changes nothing."""
    conv = nn.Conv2d(1, len(weights), 1, bias=False)
    with torch.no_grad():
        conv.weight[:] = torch.tensor(weights).view(-1, 1, 1, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(len(weights), eps=0)).eval()


def difference(student, teacher, kept, x):
    hints = Hints(student, teacher, kept, 1.0)
    hints.attach()
    with hints.listening():
        teacher(x)
        student(x)
        found = hints.difference().item()
    hints.detach()
    return found


X = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)


def test_a_copy_differs_by_nothing():
    assert difference(network(1, 2), network(1, 2), {}, X) == 0


def test_squares_are_shares_of_the_teachers_variance():
    # The teacher puts out 1, 2, -1, -2: variance 10/3. The student 3, 2, -3, -2: squares 4 and 0.
    assert difference(network(3, 2), network(1, 2), {}, X) == pytest.approx(2 / (10 / 3))


@pytest.mark.parametrize(("channel", "expected"), [(1, 0.0), (0, 1 / 2), (2, 25 / 18)])
def test_a_channel_is_held_against_the_one_that_it_was(channel, expected):
    # The student has the channel that puts out 2, -2; those of 1, -1 (variance 2) and -3, 3 (18).
    assert difference(network(2), network(1, 2, -3), {"1": [channel]}, X) == pytest.approx(expected)


def test_a_layer_that_puts_out_a_constant():
    assert difference(network(1), network(0), {}, X) == pytest.approx(1 / 1e-6)


def test_nothing_is_kept_of_other_passes_and_hooks_go():
    student, teacher = network(1), network(2)
    hints = Hints(student, teacher, {}, 1.0)
    hints.attach()
    teacher(X)
    student(X)
    assert not hints._student
    assert not hints._teacher
    with hints.listening():
        student(X)
    assert not hints._student
    hints.detach()
    assert not student[1]._forward_hooks
    assert not teacher[1]._forward_hooks


def distiller(toys, hints_weight, **options):
    student, teacher = toys.two_bn(), toys.two_bn()
    with torch.no_grad():
        student.conv2.weight.mul_(-1)
    hints = Hints(student, teacher, {}, hints_weight) if hints_weight else None
    chosen = Recovery(steps=3, batch_size=4, precision="float32", **options)
    generator = torch.Generator().manual_seed(0)
    return Distiller(student, teacher.eval(), toys.card(), chosen, CPU, generator, 3, hints=hints)


def test_the_loss_has_the_difference_in_it(toys):
    batch = toys.images(4).batch(range(4))
    plain = distiller(toys, 0).loss(batch)
    losses = [distiller(toys, weight).loss(batch) for weight in (1.0, 3.0)]
    first, second = ((loss - plain).item() for loss in losses)
    assert first > 0
    assert second == pytest.approx(3 * first, rel=1e-5)


def test_training_brings_the_layers_nearer(toys):
    trainer = distiller(toys, 10.0)
    batch = toys.images(4).batch(range(4))
    before = trainer.step(batch)
    for _ in range(20):
        after = trainer.step(batch)
    assert after < before
    trainer.finish(toys.images(4))
    assert not trainer.student.bn1._forward_hooks


@pytest.mark.slow
def test_compiled_is_eager(toys):
    batch = toys.images(4).batch(range(4))
    eager, compiled = distiller(toys, 2.0), distiller(toys, 2.0, compile=True)
    notes = []
    compiled.note = notes.append
    for _ in range(3):
        assert compiled.step(batch).item() == pytest.approx(eager.step(batch).item(), rel=1e-4)
    assert notes == []
