"""A training within a run: what it draws, what it reads ahead, and how it ends when it diverges."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.seeds import derived_seed, stream
from dreamkit.stages import samples, training_run
from dreamkit.stages.samples import fitting_sample, held_back, parted
from dreamkit.stages.teaching import teach, train_student
from dreamkit.training.augmenter import Augmentation, Augmenter
from dreamkit.training.batches import Draws, drawn_evenly, in_order
from dreamkit.training.distillation import Distillation
from dreamkit.training.incremental import IncrementalTrainer, IncrementalTraining
from dreamkit.training.reading import BatchReader
from dreamkit.training.trainer import Trainer
from dreamkit.types import StoredImages


def numbered(count, first=0):
    """Return images whose label is their number."""
    labels = torch.arange(first, first + count)
    return StoredImages(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8), labels)


def options(**changes):
    known = {"steps": 12, "batch_size": 4, "lr": 0.05, "precision": "float32"}
    return Distillation(**(known | changes))


# --- streams ----------------------------------------------------------------------------------


def test_purposes_and_neighbouring_seeds_share_nothing():
    seeds = {derived_seed(seed, purpose) for seed in range(50) for purpose in ("a", "b", "1")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
    first, again = (torch.rand(3, generator=stream(3, "a")) for _ in range(2))
    assert torch.equal(first, again)


def labels(sample):
    return set(sample.batch(range(len(sample)))[1].tolist())


def test_a_tenth_is_held_back_from_all_that_is_fitted(monkeypatch):
    monkeypatch.setattr(samples, "LEAST", 4)
    notes = []
    parts = parted(numbered(60), 5, notes.append)
    compared, fitted = labels(parts.compared), labels(parts.fitted)
    assert parts.apart
    assert (len(compared), len(fitted), compared | fitted) == (6, 54, set(range(60)))
    assert [label // 10 for label in sorted(compared)] == list(range(6)), "spread evenly"
    assert "6 of 60 images are held back" in notes[0]
    drawn = {p: labels(fitting_sample(parts.fitted, 20, 5, p)) for p in ("ranking", "statistics")}
    assert all(len(found) == 20 and not found & compared for found in drawn.values())
    assert drawn["ranking"] != drawn["statistics"], "each has a draw of its own"
    assert labels(parted(numbered(60), 6, notes.append).compared) != compared


def test_what_is_held_back_is_bounded_and_never_a_whole_batch(monkeypatch):
    assert len(held_back(319, 0)) == 0
    assert len(held_back(320, 0)) == 32
    assert len(held_back(10**6, 0)) == samples.MOST
    for seed in range(20):
        held = held_back(2000, seed)
        assert int(held.min()) > 0
        assert int(held.diff().min()) > 1


def test_where_images_are_few_a_note_says_that_agreement_is_on_training_images():
    notes = []
    parts = parted(numbered(12), 5, notes.append)
    assert not parts.apart
    assert labels(parts.compared) == labels(parts.fitted) == set(range(12))
    assert notes == [
        "agreement with the teacher is measured on images that the student is trained on: of 12 "
        "images none are held back, of 320 and more a tenth"
    ]


def test_no_two_draws_of_a_run_come_from_one_seed(toys, tmp_path, monkeypatch):
    made = []

    class Watched(Draws):
        def __init__(self, batch_size, generator):
            made.append(generator.initial_seed())
            super().__init__(batch_size, generator)

    monkeypatch.setattr(training_run, "Draws", Watched)
    context = toys.context(tmp_path)
    student, teacher = toys.residual(), toys.teacher(toys.two_bn())
    begun = []
    begin = Augmenter.begin
    monkeypatch.setattr(
        Augmenter,
        "begin",
        lambda self, step: (begin(self, step), begun.append(self.generator.initial_seed())),
    )
    train_student(teacher, student, toys.images(8), options(steps=3), context, "training")
    drawn = [context.seed, *made, *begun[1:]]
    assert len(made) == 1
    assert len(begun) == 4
    assert len({*drawn}) == len(drawn)


# --- ranks ------------------------------------------------------------------------------------


def test_each_rank_varies_its_images_in_its_own_way(monkeypatch):
    images, classes = torch.rand(8, 3, 8, 8), torch.arange(8)
    found = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        augmenter = Augmenter(Augmentation(crop=2, flip=True), 3)
        augmenter.begin(5)
        found.append(augmenter(images, classes).images)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


class Dropping(torch.nn.Module):
    """A network whose dropout tells what it dropped."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.dropped = []

    def forward(self, x):
        if self.training:
            self.dropped.append(torch.rand(4))
        return self.inner(x)


def test_each_rank_and_each_step_drops_other_units(toys, tmp_path, monkeypatch):
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        student = Dropping(toys.residual())
        context = toys.context(tmp_path / str(rank))
        teacher = toys.teacher(toys.two_bn())
        train_student(teacher, student, toys.images(8), options(steps=3), context, "training")
        found += [tuple(drawn.tolist()) for drawn in student.dropped]
    assert len(found) == len({*found}) == 6


# --- statistics taken anew --------------------------------------------------------------------


def test_images_are_drawn_evenly_from_sets_of_any_size():
    sets = [numbered(20), numbered(5, first=100)]
    sample = drawn_evenly(sets, 10, torch.Generator().manual_seed(0))
    found = sample.batch(range(len(sample)))[1]
    assert len(found) == 20
    assert len(found[found < 100].unique()) == 10
    assert found[found >= 100].bincount()[100:].tolist() == [2] * 5
    assert not torch.equal(found, found.sort().values)
    alone = drawn_evenly([numbered(7)], 10, torch.Generator())
    assert sorted(alone.batch(range(7))[1].tolist()) == list(range(7))
    assert len(alone) == 7


def test_recalibration_sees_every_class_and_every_set(toys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dreamkit.training.statistics.recalibrate",
        lambda model, batches, advance: seen.append(
            [labels for _, labels in in_order(batches.images, batches.batch_size)]
        ),
    )
    context, classes = toys.context(tmp_path), torch.arange(60) // 20  # sorted by class
    images = StoredImages(toys.images(60).images, classes)
    anew = {"statistics": "recalibrate", "statistics_batches": 2}
    how = options(steps=2, batch_size=10, **anew)
    train_student(toys.teacher(toys.two_bn()), toys.residual(), images, how, context, "training")
    (batches,) = seen
    assert [len(batch) for batch in batches] == [10, 10]
    assert set(torch.cat(batches).tolist()) == {0, 1, 2}

    seen.clear()
    how = IncrementalTraining(
        steps=2,
        batch_size=10,
        statistics="recalibrate",
        statistics_batches=2,
        freeze_bn=False,
        precision="float32",
    )
    loss = Distance()
    old, student = toys.two_bn(), toys.two_bn(classes=5)
    trainer = IncrementalTrainer((loss,), student, old, toys.card(), how, torch.device("cpu"), 3, 2)
    new = StoredImages(images.images, torch.full((60,), 4))
    teach(trainer, [new, images], context, "incremental")
    (batches,) = seen
    assert [len(batch) for batch in batches] == [20, 20]
    assert int((torch.cat(batches) == 4).sum()) == 20, "as many of each set as a step has"


class Distance:
    """A term of a training's loss."""

    weight = 1.0

    def entry(self, step):
        return step.logits.square().mean()


# --- divergence -------------------------------------------------------------------------------


def test_a_training_that_diverges_ends_at_once_and_says_where(toys, tmp_path, monkeypatch):
    steps = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, *b, share: steps.append(1) or step(self, *b, share=share)
    )
    monkeypatch.setattr(training_run, "CHECKPOINT_SECONDS", 0.0)
    context, student = toys.context(tmp_path), toys.residual()
    wild = options(steps=5000, lr=1e25, warmup=0)
    teacher = toys.teacher(toys.two_bn())
    with pytest.raises(DreamkitError, match=r"not finite at step \d+ of 5000.*lower lr") as caught:
        train_student(teacher, student, toys.images(10), wild, context, "training")
    assert caught.value.path == ("lr",)
    assert f"at step {len(steps)} of" in caught.value.message
    assert len(steps) < 20


class Elsewhere:
    """A loss on another device than the CPU."""

    device = torch.device("meta")

    def __init__(self, loss):
        self.loss = loss

    def __float__(self):
        return float(self.loss)


def test_off_the_cpu_a_divergence_is_looked_for_now_and_then(toys, tmp_path, monkeypatch):
    looks, run = [], training_run.TrainingRun
    step, refuse = run._step, run._refuse_divergence

    def look(self):
        looks.append(self.trainer.done)
        refuse(self)

    monkeypatch.setattr(run, "_step", lambda self: Elsewhere(step(self)))
    monkeypatch.setattr(run, "_refuse_divergence", look)
    context, teacher = toys.context(tmp_path), toys.teacher(toys.two_bn())
    how = options(steps=400)
    train_student(teacher, toys.residual(), toys.images(10), how, context, "training")
    assert looks == list(range(2, 401, 2))


# --- reading ahead ----------------------------------------------------------------------------


class Watched:
    """Images that tell by which thread they are read, and when."""

    def __init__(self, images, seconds=0.0):
        self.images, self.seconds, self.threads, self.busy = images, seconds, [], False

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        assert not self.busy, "one thread at a time"
        self.busy = True
        self.threads.append(threading.current_thread())
        time.sleep(self.seconds)
        self.busy = False
        return self.images.batch(indices)


def test_the_next_batch_is_read_while_a_step_runs(toys, tmp_path, monkeypatch):
    images, ready = Watched(toys.images(10)), []
    step = Trainer.step

    def slow(self, *batches, share):
        end = time.monotonic() + 5
        last = self.done + 1 == self.total
        while not last and len(images.threads) < self.done + 2 and time.monotonic() < end:
            time.sleep(0.001)
        ready.append(len(images.threads) - self.done)
        return step(self, *batches, share=share)

    monkeypatch.setattr(Trainer, "step", slow)
    context = toys.context(tmp_path)
    train_student(
        toys.teacher(toys.two_bn()), toys.residual(), images, options(steps=4), context, "training"
    )
    assert ready == [2, 2, 2, 1]
    others = {thread for thread in images.threads if thread is not threading.main_thread()}
    assert len(others) == 1
    assert not others.pop().is_alive()


def test_reading_ahead_changes_no_student(toys, tmp_path, monkeypatch):
    states = []
    for number in range(2):
        if number:
            monkeypatch.setattr(BatchReader, "at_work", lambda self: contextlib.nullcontext())
        student = toys.residual()
        train_student(
            toys.teacher(toys.two_bn()),
            student,
            toys.images(10),
            options(augmentation=Augmentation(crop=1, flip=True)),
            toys.context(tmp_path / str(number)),
            "training",
        )
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_that_one_thread_alone_can_read(toys, tmp_path):
    home = threading.current_thread()

    class Bound(Watched):
        def batch(self, indices):
            if threading.current_thread() is not home:
                raise RuntimeError("objects of one thread cannot be used in another")
            return super().batch(indices)

    images, context = Bound(toys.images(10)), toys.context(tmp_path)
    teacher = toys.teacher(toys.two_bn())
    train_student(teacher, toys.residual(), images, options(), context, "training")
    assert len(images.threads) == 12
    assert sum("read between steps" in note for note in context.log.notes) == 1


def test_what_is_wrong_with_an_image_is_told_by_name(toys, tmp_path):
    class Broken(Watched):
        def batch(self, indices):
            if len(self.threads) == 3:
                raise DreamkitError("the file x.png is damaged")
            return super().batch(indices)

    images, context = Broken(toys.images(10)), toys.context(tmp_path)
    threads = threading.active_count()
    with pytest.raises(DreamkitError, match=r"x\.png"):
        train_student(
            toys.teacher(toys.two_bn()), toys.residual(), images, options(), context, "training"
        )
    assert threading.active_count() == threads


def test_what_was_read_ahead_is_dealt_again_after_an_interruption():
    images = numbered(10)
    draws = [Draws(4, stream(0, "x"))]
    draws[0].add(10)
    reader = BatchReader([images], draws)
    with reader.at_work():
        reader.next()
        before = reader.state()
        with reader.reading_ahead(True):
            pass
        kept = reader.state()
        expected = [reader.next()[0][1].tolist() for _ in range(4)]
    assert torch.equal(kept[0]["coming"], before[0]["coming"])
    again = BatchReader([images], [Draws(4, torch.Generator())])
    again.restore(kept)
    assert [again.next()[0][1].tolist() for _ in range(4)] == expected
