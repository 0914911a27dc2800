"""What statistics by difference start from in a pruning: the teacher, or what was trained last."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from dreamkit.applications.prune import Prune
from dreamkit.criteria.random import Random
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import Limits
from dreamkit.registry import Term
from dreamkit.report.run_log import MemoryLog
from dreamkit.stages import pauses, pruning_state
from dreamkit.stages.budget import Target
from dreamkit.stages.pauses import Pauses
from dreamkit.stages.reconstructing import Reconstruction
from dreamkit.stages.reference import Reference
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import Recovery, train_student
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.difference_statistics import take_difference

TRAINED = Recovery(steps=2, batch_size=8, precision="float32", lr=0.1)


def pruning(**changes):
    known = {
        "criteria": (Term("random", 1.0, Random()),),
        "target": Target(params=0.5),
        "recovery": Recovery(epochs=0, batch_size=8),
        "limits": Limits(min_channels=1),
        "step": 0.1,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 2,
    }
    return Prune(**(known | changes))


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn())


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


@pytest.mark.parametrize("kind", ["two_bn", "residual", "depthwise", "concatenated"])
def test_what_is_kept_since_is_what_a_second_cut_kept(toys, kind):
    graph = ChannelGraph(getattr(toys, kind)(), (3, 8, 8), PruningRecord())
    names = [group.name for group in graph.groups()[0]]
    graph.remove({names[0]: [1]})
    cut = graph.pruning_record
    earlier = PruningRecord(dict(cut.kept))
    second = {name: [0] for name in names}
    _, later = graph.without(second)
    graph.remove(second)
    since = cut.kept_since(earlier)
    assert later.kept
    assert {name: since[name] for name in later.kept} == later.kept
    assert later.after(earlier).kept == cut.kept
    for name in since.keys() - later.kept.keys():  # the second cut left these whole
        assert all(kept in (None, list(range(len(kept or ())))) for kept in since[name])
    assert cut.kept_since(PruningRecord()) == cut.kept


def test_statistics_that_weights_were_fitted_to_stay_until_more_is_cut(toys, teacher, context):
    student, images = copy.deepcopy(teacher.model), toys.images(24)
    graph = ChannelGraph(student, (3, 8, 8), PruningRecord())
    cut, reference = graph.pruning_record, Reference(teacher)

    def taken(network, kept):
        made = copy.deepcopy(student)
        give_statistics("difference", network, made, kept, images, 8, context)
        return made

    graph.remove({"conv1": [1], "conv2": [0, 4]})
    first = taken(teacher, cut.kept)
    toys.assert_same_tensors(taken(reference.network, reference.kept(cut)), first)
    student.load_state_dict(first.state_dict())
    train_student(teacher, student, images, TRAINED, context, "pause", False, cut.kept)
    assert not student.bn1.weight.equal(first.bn1.weight)
    assert student.bn1.running_mean.equal(first.bn1.running_mean), "they are frozen"
    reference.become(student, cut, 1)
    toys.assert_same_tensors(taken(reference.network, reference.kept(cut)), student)
    again = taken(teacher, cut.kept)
    assert not torch.allclose(again.bn1.running_mean, student.bn1.running_mean, atol=1e-3), "moved"

    # What is cut next moves them from there: by hand, with channels of the trained student.
    trained = copy.deepcopy(student)
    graph.remove({"conv1": [0], "conv2": [1]})
    expected = copy.deepcopy(student)
    kept = {"bn1": [1, 2], "bn2": [0, 2, 3]}
    kept = {f"{n}.{k}": [p] for n, p in kept.items() for k in ("running_mean", "running_var")}
    batches = NormalisedBatches(images, teacher.card, context.device, 8)
    take_difference(expected, trained, kept, batches)
    made = taken(reference.network, reference.kept(cut))
    toys.assert_same_tensors(made, expected)
    assert made.bn1.running_mean.equal(trained.bn1.running_mean[[1, 2]])
    assert not torch.allclose(made.bn2.running_mean, trained.bn2.running_mean[[0, 2, 3]], atol=1e-3)
    toys.assert_same_tensors(reference.network.model, trained)


class Watch:
    """What statistics were taken from in each round, and each student as its training left it."""

    def __init__(self, monkeypatch):
        self.taken_from, self.trained = [], []
        monkeypatch.setattr(pruning_state, "give_statistics", self.give)
        monkeypatch.setattr(pauses, "train_student", self.train)

    def give(self, how, network, student, kept, *rest):
        give_statistics(how, network, student, kept, *rest)
        self.taken_from.append(network)

    def train(self, teacher, student, *rest):
        train_student(teacher, student, *rest)
        self.trained.append(copy.deepcopy(student))


def test_a_round_takes_statistics_from_what_the_last_training_left(
    toys, teacher, context, monkeypatch
):
    watch = Watch(monkeypatch)
    pruning(finetune=TRAINED).run(teacher, toys.images(24), context)
    first, *others = watch.taken_from
    assert first is teacher
    assert len(others) > 1
    for network, student in zip(others, watch.trained, strict=False):
        toys.assert_same_tensors(network.model, student)
        assert not any(p.requires_grad for p in network.model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finetune": TRAINED, "finetune_drop": 0.99},
        {"finetune": dataclasses.replace(TRAINED, freeze_bn=False)},
        {"finetune": TRAINED, "statistics": "recalibrate"},
        {"finetune": TRAINED, "statistics": "keep"},
    ],
    ids=["untrained", "never trained", "not frozen", "recalibrate", "keep"],
)
def test_else_it_is_the_teacher(toys, teacher, context, monkeypatch, options):
    watch = Watch(monkeypatch)
    monkeypatch.setattr(Pauses, "_agreement", lambda self, student: 0.5)
    monkeypatch.setattr(Reference, "become", None)  # no copy is made
    pruning(**options).run(teacher, toys.images(24), context)
    assert len(watch.taken_from) > 1
    assert all(network is teacher for network in watch.taken_from)


def test_a_fit_in_each_round_is_to_the_teacher(toys, teacher, context, monkeypatch):
    monkeypatch.setattr(Reference, "become", None)
    fit = {"reconstruction": Reconstruction(images=8, batch_size=4), "reconstruct_each": True}
    pruning(finetune=TRAINED, **fit).run(teacher, toys.images(24), context)
    assert context.log.metrics["training.steps"] > TRAINED.steps


class Interrupted(BaseException):
    """Stands for a kill."""


class Ending(MemoryLog):
    """A log that ends a run before it keeps the record of some round."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def record(self, stage, step, numbers):
        if (stage, step) == ("pruning", self.last):
            raise Interrupted
        super().record(stage, step, numbers)


@pytest.mark.parametrize("drop", [None, 0.3], ids=["each round", "the first round alone"])
def test_a_resumed_pruning_takes_statistics_from_the_same_student(
    toys, teacher, tmp_path, monkeypatch, drop
):
    # It falls from 1 to this in the first round, and no further.
    monkeypatch.setattr(Pauses, "_agreement", lambda self, student: 0.5)
    watch = Watch(monkeypatch)
    options, images = pruning(finetune=TRAINED, finetune_drop=drop), toys.images(24)
    expected = options.run(teacher, images, toys.context(tmp_path / "whole")).student.model
    assert len(watch.trained) == (1 if drop else len(watch.taken_from))
    assert len(watch.taken_from) > 4

    folder, last = tmp_path / "parts", 4
    with pytest.raises(Interrupted):
        options.run(teacher, images, toys.context(folder, log=Ending(last)))
    watch = Watch(monkeypatch)
    student = options.run(teacher, images, toys.context(folder)).student.model
    toys.assert_same_tensors(student, expected)
    first = watch.taken_from[0].model  # of round 4
    assert any(
        a.shape != b.shape
        for a, b in zip(first.parameters(), teacher.model.parameters(), strict=True)
    )
