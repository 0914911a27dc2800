"""BatchNorm statistics by difference: the teacher's, moved by what student and teacher see."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from dreamkit import distributed
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.model_state import hooked
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.training import difference_statistics
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.difference_statistics import BOUND, seen_by, take_difference
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.training.incremental import IncrementalTraining
from dreamkit.training.statistics import take_statistics

CPU = torch.device("cpu")


def difference(toys, student, teacher, images, kept=None, batches=9, batch_size=99):
    kept = {} if kept is None else kept
    shown = NormalisedBatches(images, toys.card(), CPU, batch_size, batches)
    return take_difference(student, teacher, kept, shown)


def seen(x):
    """Return mean and biased variance of channels, in float64."""
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


def by_hand(bn, channels, ours, theirs):
    """Return the statistics that the definition gives, from what the two networks see."""
    (own_mean, own_var), (mean, var) = seen(ours), seen(theirs)
    mean, var = mean[channels], var[channels]
    factor = (own_var / var).clamp(1 / BOUND, BOUND)
    return bn.running_mean.double()[channels] + own_mean - mean, bn.running_var[channels] * factor


def normalised(x, mean, var, bn, channels):
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + bn.eps).sqrt()
    return x * bn.weight[channels].view(shape) + bn.bias[channels].view(shape)


def cut(teacher, size=(3, 8, 8), **removed):
    """Return a pruned copy of a network, and what it keeps."""
    student, record = copy.deepcopy(teacher), PruningRecord()
    ChannelGraph(student, size, record).remove(removed)
    return student, record.kept


def assert_same_bits(model, other):
    for (name, tensor), twin in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert tensor.equal(twin), name
        assert tensor.signbit().equal(twin.signbit()) or not tensor.is_floating_point(), name


@pytest.mark.parametrize("batch_size", [8, 3, 1])
@pytest.mark.parametrize("kind", ["two_bn", "residual", "depthwise"])
def test_an_untouched_teacher_comes_out_to_the_last_bit(toys, kind, batch_size):
    teacher = getattr(toys, kind)()
    teacher.bn1.running_mean[0] = -0.0
    student = copy.deepcopy(teacher)
    alone = difference(toys, student, teacher, toys.images(8), batch_size=batch_size)
    assert alone == []
    assert_same_bits(student, teacher)


def test_each_layer_has_what_follows_from_the_mended_layers_before_it(toys):
    teacher, images = toys.two_bn(), toys.images(6)
    before = copy.deepcopy(teacher.state_dict())
    student, kept = cut(teacher, conv1=[1], conv2=[0, 4])
    student.bn1.running_mean.fill_(77)  # whatever it has is not looked at
    difference(toys, student, teacher, images, kept)

    x = toys.card().normalise(images.images).double()
    twin = copy.deepcopy(teacher).double()
    first, second = [0, 2, 3], [1, 2, 3, 5]
    theirs = twin.conv1(x)
    mean, var = by_hand(twin.bn1, first, theirs[:, first], theirs)
    torch.testing.assert_close(student.bn1.running_mean.double(), mean)
    torch.testing.assert_close(student.bn1.running_mean, teacher.bn1.running_mean[first])
    ours = F.relu(normalised(theirs[:, first], mean, var, twin.bn1, first))
    ours = F.conv2d(ours, twin.conv2.weight[second][:, first], padding=1)
    theirs = twin.conv2(F.relu(twin.bn1(theirs)))
    mean, var = by_hand(twin.bn2, second, ours, theirs)
    torch.testing.assert_close(student.bn2.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.bn2.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(student.bn2.running_mean, teacher.bn2.running_mean[second])
    assert all(teacher.state_dict()[name].equal(tensor) for name, tensor in before.items())


def test_batches_add_up_to_the_statistics_of_all_their_images(toys):
    teacher, images = toys.two_bn(), toys.images(8)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.conv1.weight.add_(0.1)
    whole = copy.deepcopy(student)
    difference(toys, whole, teacher, images)
    few = copy.deepcopy(student)
    difference(toys, few, teacher, images, batches=2, batch_size=3)
    done = []
    take_difference(
        student, teacher, {}, NormalisedBatches(images, toys.card(), CPU, 3), done.append
    )
    assert done == [1, 2, 3]
    # No layer comes before the first: its statistics do not depend on how images are batched.
    torch.testing.assert_close(student.bn1.running_mean, whole.bn1.running_mean)
    torch.testing.assert_close(student.bn1.running_var, whole.bn1.running_var)
    torch.testing.assert_close(student.bn2.running_var, whole.bn2.running_var, rtol=0.05, atol=0)
    assert not torch.allclose(few.bn1.running_mean, whole.bn1.running_mean)


def test_depthwise_channels_that_went_leave_the_others_as_they_were(toys):
    # A depthwise filter sees one channel, so that nothing but the classifier misses the other.
    teacher = toys.depthwise()
    student, kept = cut(teacher, conv1=[2])
    assert student.depthwise.groups == 3
    difference(toys, student, teacher, toys.images(5), kept)
    for name in ("bn1", "bn2"):
        for key in ("running_mean", "running_var"):
            theirs = teacher.get_submodule(name).get_buffer(key)[[0, 1, 3]]
            torch.testing.assert_close(student.get_submodule(name).get_buffer(key), theirs)


def test_a_channel_without_variance_keeps_its_teachers_and_no_factor_is_beyond_the_bound(toys):
    teacher = toys.two_bn()
    with torch.no_grad():
        teacher.conv1.weight[0] = 0
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.conv1.weight[0] = 1  # flat at the teacher's alone
        student.conv1.weight[1] = 0  # flat at the student's alone
        student.conv1.weight[2] *= 100
        student.conv1.weight[3] /= 100
    difference(toys, student, teacher, toys.images(4))
    factors = student.bn1.running_var / teacher.bn1.running_var
    torch.testing.assert_close(factors, torch.tensor([1.0, 1.0, BOUND, 1 / BOUND]))
    assert all(bool(t.isfinite().all()) for t in student.buffers())


class Norms(nn.Module):
    """A layer, then what normalises: rows, sequences, volumes, or over all ranks."""

    def __init__(self, shape, bn):
        super().__init__()
        self.linear = nn.Linear(192, 24)
        self.shape = shape
        self.bn = bn

    def forward(self, x):
        return self.bn(self.linear(x.flatten(1)).view(len(x), *self.shape)).flatten(1)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(24), (24,)),
        (nn.BatchNorm1d(4), (4, 6)),
        (nn.BatchNorm2d(6), (6, 2, 2)),
        (nn.BatchNorm3d(3), (3, 2, 2, 2)),
        (nn.SyncBatchNorm(6), (6, 2, 2)),
        (FrozenBatchNorm2d(6), (6, 2, 2)),
        (nn.BatchNorm2d(6, affine=False), (6, 2, 2)),
    ],
)
def test_every_kind_of_batch_norm_in_any_mode(toys, norm, shape):
    teacher = toys.fill(Norms(shape, copy.deepcopy(norm)))
    student = copy.deepcopy(teacher).train()
    with torch.no_grad():
        student.linear.bias.add_(2.5)
    teacher.train()
    modes = [m.training for m in student.modules()]
    assert difference(toys, student, teacher, toys.images(5), batch_size=2) == []
    torch.testing.assert_close(
        student.bn.running_mean, teacher.bn.running_mean + 2.5, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(student.bn.running_var, teacher.bn.running_var, rtol=1e-4, atol=1e-5)
    assert [m.training for m in student.modules()] == modes
    assert all(m.training for m in teacher.modules())
    assert not any(m._forward_pre_hooks for m in (*student.modules(), *teacher.modules()))
    assert getattr(student.bn, "momentum", 0.1) == 0.1


def test_a_layer_called_twice_counts_both_calls(toys):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.same = self.bn

        def forward(self, x):
            return self.same(2 * self.conv(self.bn(self.conv(x)))).mean((2, 3))

    teacher = toys.fill(Twice())
    student = copy.deepcopy(teacher)
    difference(toys, student, teacher, toys.images(4), batch_size=2)
    assert_same_bits(student, teacher)
    given = []
    for model in (teacher, student):
        handle = model.bn.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
        with torch.no_grad():
            student.conv.bias.fill_(0.3)
            if model is student:
                difference(toys, student, teacher, toys.images(4))
            else:
                model(toys.card().normalise(toys.images(4).images))
        handle.remove()
    (mean, _), (own, _) = (seen(torch.cat(pair)) for pair in (given[:2], given[2:4]))
    expected = teacher.bn.running_mean + (own - mean).float()
    torch.testing.assert_close(student.bn.running_mean, expected, rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    """A layer that normalises sequences (N, L, C) by running statistics, as transformers do."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


def test_channels_may_come_last(toys):
    teacher = toys.fill(Norms((6, 4), Positions(4)))
    student, images = copy.deepcopy(teacher), toys.images(5)
    with torch.no_grad():
        student.linear.bias.add_(2.5)
        student.linear.weight.mul_(2)
    assert difference(toys, student, teacher, images, batch_size=2) == []
    x = toys.card().normalise(images.images).flatten(1)
    ours, theirs = (m.linear(x).view(-1, 4) for m in (student, teacher))
    mean = teacher.bn.running_mean + ours.mean(0) - theirs.mean(0)
    torch.testing.assert_close(student.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    var = teacher.bn.running_var * ours.var(0) / theirs.var(0)
    torch.testing.assert_close(student.bn.running_var, var, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_what_is_scripted_takes_no_hooks_and_is_left_alone(toys):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = toys.fill(nn.BatchNorm2d(3))
            self.second = torch.jit.script(toys.fill(nn.BatchNorm2d(3)))

        def forward(self, x):
            return self.second(self.first(x)).mean((2, 3))

    student, teacher = Partly().eval(), Partly().eval()
    student.first.running_mean.add_(1)
    assert difference(toys, student, teacher, toys.images(4)) == ["second"]
    assert_same_bits(student, teacher)
    with pytest.raises(RuntimeError, match="not supported"), hooked(student.named_children(), min):
        pass
    assert not student.first._forward_pre_hooks
    distiller(toys, nn.Sequential(student.second), teacher, statistics="difference")


def test_without_batch_norm_no_image_is_looked_at(toys):
    assert difference(toys, toys.plain(), toys.plain(), None) == []


def test_layers_that_the_teacher_lacks_are_left_alone_and_named(toys):
    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toys.two_bn()
            self.bn_more = nn.BatchNorm1d(3)
            self.untracked = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return self.untracked(self.bn_more(self.body(x)))

    class Less(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toys.two_bn()

        def forward(self, x):
            return self.body(x)

    student, teacher, notes = toys.fill(More()), Less(), []
    student.body.bn2 = nn.BatchNorm2d(6).eval()
    teacher.body.bn2 = nn.Identity()
    before = copy.deepcopy(student.bn_more.state_dict())
    batches = NormalisedBatches(toys.images(4), toys.card(), CPU, 4)
    take_statistics("difference", student, teacher, {}, batches, note=notes.append)
    (note,) = notes
    assert note.startswith("body.bn2, bn_more: BatchNorm statistics left as they were")
    assert all(t.equal(student.bn_more.state_dict()[name]) for name, t in before.items())


@pytest.mark.parametrize("kept", [{"bn1.running_mean": [[0, 9]]}, {"bn1.running_mean": [[0]]}])
def test_channels_that_the_teacher_lacks_are_no_counterpart(toys, kept):
    student = toys.two_bn()
    assert difference(toys, student, toys.two_bn(), toys.images(2), kept) == ["bn1"]


def test_what_a_student_calls_more_often_is_left_to_what_its_teacher_calls(toys):
    class Body(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.bn, self.times = nn.BatchNorm2d(3), times

        def forward(self, x):
            for _ in range(self.times):
                x = self.bn(x)
            return x.mean((2, 3))

    teacher, student = toys.fill(Body(1)), toys.fill(Body(2))
    assert difference(toys, student, teacher, toys.images(4)) == ["bn"]
    assert_same_bits(student, teacher)


def test_ranks_have_the_first_ones_statistics(toys, monkeypatch):
    first = toys.two_bn()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(
        difference_statistics.distributed,
        "broadcast_tensors",
        lambda own, device: {name: first.get_buffer(name) + 1 for name in own},
    )
    student = toys.two_bn()
    difference(toys, student, toys.two_bn(), toys.images(4))
    assert student.bn2.running_var.equal(first.bn2.running_var + 1)


def test_what_recalibrates_and_what_keeps(toys):
    images, card = toys.images(4), toys.card()
    kept, recalibrated = toys.two_bn(), toys.two_bn()
    for how, model in (("keep", kept), ("recalibrate", recalibrated)):
        batches = NormalisedBatches(images, card, CPU, 4, 1)
        take_statistics(how, model, toys.two_bn(), {}, batches)
    assert_same_bits(kept, toys.two_bn())
    mean, _ = seen(recalibrated.conv1(card.normalise(images.images)))
    torch.testing.assert_close(recalibrated.bn1.running_mean.double(), mean)


# --- in training ------------------------------------------------------------------------------


def distiller(toys, student, teacher, **options):
    made = {"steps": 2, "batch_size": 4, "precision": "float32", "lr": 1e-9, "weight_decay": 0}
    how = Distillation(**made | options)
    return Distiller(student, teacher, toys.card(), how, CPU, 3, 2)


def test_statistics_after_training_are_the_teachers_where_nothing_was_learnt(toys):
    images = toys.images(8)
    for statistics in ("keep", "difference"):
        student, teacher = toys.two_bn(), toys.two_bn()
        trainer = distiller(toys, student, teacher, statistics=statistics)
        trainer.step((images.images, images.labels))
        trainer.finish([images])
        moved = float((student.bn1.running_mean - teacher.bn1.running_mean).abs().max())
        assert (moved > 1e-3) == (statistics == "keep")


def test_the_end_of_a_training_tells_how_far_its_statistics_are(toys):
    told, images = [], toys.images(10)

    @contextmanager
    def progress(total):
        told.append(f"of {total}")
        yield told.append

    trainer = distiller(toys, toys.two_bn(), toys.two_bn(), statistics="difference")
    trainer.step((images.images, images.labels))
    trainer.finish([images], progress)
    assert told == ["of 3", 1, 2, 3]


def test_frozen_statistics_stay_and_are_trained_with(toys):
    images, student = toys.images(8), toys.two_bn()
    trainer = distiller(toys, student, toys.two_bn(), freeze_bn=True)
    assert student.training
    assert not student.bn1.training
    loss = trainer.step((images.images, images.labels))
    assert float(loss) < 1e-6, "it computes what its teacher does"
    trainer.finish([images])
    assert student.bn1.running_mean.equal(toys.two_bn().bn1.running_mean)


def test_a_stranger_has_no_statistics_of_the_teachers(toys):
    with pytest.raises(DreamkitError, match="none of its BatchNorm layers") as caught:
        distiller(toys, nn.Sequential(nn.BatchNorm2d(3)), toys.two_bn(), statistics="difference")
    assert caught.value.path == ("statistics",)
    distiller(toys, toys.plain(), toys.two_bn(), statistics="difference")  # nothing to take


@pytest.mark.parametrize("kind", [Distillation, IncrementalTraining])
def test_frozen_statistics_are_not_recalibrated(kind):
    with pytest.raises(OptionError, match="would undo what freeze_bn keeps") as caught:
        kind(freeze_bn=True, statistics="recalibrate")
    assert caught.value.option == "statistics"


def test_what_the_teacher_sees_is_known_after_one_showing(toys):
    """Statistics of several students come of one look at the teacher, to the last bit."""
    teacher, images = toys.two_bn(), toys.images(20)
    shown = NormalisedBatches(images, toys.card(), CPU, 8, 9)
    known = seen_by(teacher, shown)
    shows = []
    for removed in ({"conv1": [0]}, {"conv2": [1, 2]}):
        (student, kept), other = cut(teacher, **removed), cut(teacher, **removed)[0]
        take_difference(student, teacher, kept, shown)
        handle = teacher.register_forward_hook(lambda *args: shows.append(1))
        take_difference(other, teacher, kept, shown, seen=known)
        handle.remove()
        toys.assert_same_tensors(other, student)
    assert not shows
