"""Pruning to a network that takes smaller images: fewer FLOPs in all layers at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.applications.prune import Prune
from dreamkit.applications.quantize import Quantize
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.errors import DreamkitError, OptionError, TeacherMismatch
from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.registry import Term
from dreamkit.resizing import Resized, TakesResized, for_card, resized
from dreamkit.stages.adaptive import Adaptive
from dreamkit.stages.budget import Target
from dreamkit.stages.teaching import Recovery
from dreamkit.training.augmenter import Augmentation
from dreamkit.types import LatencyBackend, Timing

CPU = torch.device("cpu")
SIZE = (3, 16, 16)


class PerPixel(LatencyBackend):
    """A target whose times are the FLOPs of an image's pixels, in milliseconds."""

    batch_size = 1

    def describe(self):
        return {"name": "per pixel"}

    def time(self, modules):
        found = []
        for module, example in modules:
            weights = sum(p.numel() for p in module.parameters())
            found.append(Timing(weights * example[0, 0].numel() / 1000, 0.0))
        return found


def options(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(flops=0.5),
        "image_size": 12,
        "recovery": Recovery(steps=2, batch_size=8),
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn(), toys.card(SIZE))


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path, evaluation=toys.images(20, size=SIZE))


def test_images_are_scaled_whole_and_keep_their_labels(toys):
    images = toys.images(6, size=SIZE)
    small = Resized(images, (12, 12))
    stored, labels = small.batch([4, 1])
    assert stored.shape == (2, 3, 12, 12)
    assert stored.dtype == torch.uint8
    of_one, _ = images.batch([4, 1])
    scaled = F.interpolate(of_one.float(), size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(stored, scaled.round().clamp(0, 255).to(torch.uint8))
    assert labels.tolist() == images.labels[[4, 1]].tolist()
    assert len(small) == 6
    assert small.labels.tolist() == images.labels.tolist()
    assert resized(of_one, (16, 16)) is of_one
    assert for_card(images, toys.card(SIZE), toys.card(SIZE)) is images


def test_a_target_counts_what_smaller_images_save(toys, teacher, context):
    before = copy.deepcopy(teacher.model)
    outcome = options().run(teacher, toys.images(40, size=SIZE), context)
    metrics, student = context.log.metrics, outcome.student
    assert student.card.input_size == (3, 12, 12)
    assert metrics["resized.flops"] / flops(teacher) == pytest.approx(144 / 256, abs=0.01)
    assert metrics["pruned.flops_ratio"] <= 0.5
    assert metrics["pruned.channels_ratio"] > 0.6  # the half of all FLOPs, and few channels for it
    assert outcome.images.batch([0])[0].shape == (1, 3, 12, 12)
    toys.assert_same_tensors(teacher.model, before)


def flops(teacher):
    return count(teacher.model, teacher.card.input_size).flops


def test_student_and_teacher_are_each_judged_on_images_of_their_own_size(toys, teacher, context):
    images = toys.images(40, size=SIZE)
    student = options().run(teacher, images, context).student
    metrics, card = context.log.metrics, teacher.card
    small = Resized(context.evaluation, (12, 12))
    found = accuracy(student.model, small, student.card, CPU)
    assert metrics["student.accuracy"] == pytest.approx(found, abs=0.051)  # one of 20: not rounded
    assert metrics["teacher.accuracy"] == accuracy(teacher.model, context.evaluation, card, CPU)
    whole = TakesResized(teacher.model, (12, 12))
    agreed = agreement(whole, teacher.model, images, card, CPU)
    assert metrics["resized.agreement"] == agreed


def test_smaller_images_alone_may_meet_the_target(toys, teacher, context):
    options(target=Target(flops=0.6)).run(teacher, toys.images(40, size=SIZE), context)
    metrics = context.log.metrics
    assert metrics["pruned.rounds"] == 0
    assert metrics["pruned.channels_ratio"] == 1.0
    assert metrics["pruned.flops_ratio"] == pytest.approx(144 / 256, abs=0.01)


def test_a_latency_is_of_each_ones_own_images(toys, teacher, tmp_path):
    context = toys.context(tmp_path, latency=PerPixel())
    options(target=Target(latency=0.5)).run(teacher, toys.images(40, size=SIZE), context)
    metrics = context.log.metrics
    weights = sum(p.numel() for p in teacher.model.parameters())
    assert metrics["teacher.latency_ms"] == pytest.approx(weights * 256 / 1000)
    assert metrics["student.latency_ms"] <= 0.5 * 1.05 * metrics["teacher.latency_ms"]
    # Half of the time, of which the images' size alone saves 44 %.
    assert metrics["pruned.channels_ratio"] > 0.6


def test_what_cannot_be_is_refused_before_dreaming(toys, teacher, context):
    for size in (16, 20):
        with pytest.raises(TeacherMismatch, match="smaller than the teacher's") as caught:
            options(image_size=size).run(teacher, None, context)
        assert caught.value.path == ("image_size",)
    oblong = toys.teacher(toys.two_bn(), toys.card((3, 16, 8)))
    with pytest.raises(TeacherMismatch, match="takes 16x8"):
        options(image_size=8).run(oblong, None, context)
    with pytest.raises(OptionError, match="teacher's own size"):
        options(adaptive=Adaptive())


def test_a_network_that_takes_no_other_size_is_refused_by_name(toys, context):
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 256, 3))
    with pytest.raises(TeacherMismatch, match="does not take an image") as caught:
        options().run(toys.teacher(fixed.eval(), toys.card(SIZE)), None, context)
    assert caught.value.path[0] == "image_size"


def test_windows_larger_than_the_smaller_images_are_refused_before_dreaming(teacher, context):
    recovery = Recovery(steps=2, batch_size=8, augmentation=Augmentation(size=14))
    with pytest.raises(DreamkitError, match="14") as caught:
        options(recovery=recovery).run(teacher, None, context)
    assert caught.value.path[0] == "recovery"
    with pytest.raises(DreamkitError, match="14") as caught:
        options(finetune=recovery).run(teacher, None, context)
    assert caught.value.path[0] == "finetune"


def test_in_integers_it_is_judged_on_images_of_its_own_size(toys, teacher, context):
    pytest.importorskip("onnxruntime")
    application = Quantize(after=options(), latency_batches=(), max_disagreement=1.0)
    images = toys.images(80, size=SIZE)
    student = application.run(teacher, images, context).student
    metrics = context.log.metrics
    small = Resized(context.evaluation, (12, 12))
    assert metrics["student.accuracy"] == accuracy(student.model, small, student.card, CPU)
    assert 0 <= metrics["int8.accuracy"] <= 1
