"""Adaptive DeepInversion: what is dreamed when, and that a run in two parts ends where one does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dreamkit.errors import DreamkitError, NonFiniteLoss, StoreError
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.stages import samples, training_run
from dreamkit.stages.adaptive import Adaptive, AdaptivePool, adaptive_pool
from dreamkit.stages.batches import batch_plans
from dreamkit.stages.teaching import train_student
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.store.dreams import DreamStore, holds_dreams
from dreamkit.store.pool import Pool
from dreamkit.synthesizers.deepinversion import DeepInversion, Inversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.types import StoredImages, Synthesis

TRAINING = Distillation(
    steps=12,
    batch_size=4,
    lr=0.05,
    precision="float32",
    augmentation=Augmentation(crop=1, flip=True),
)
EVERY_THREE = Adaptive(every=3, batches=1)


SYNTHESIS = Synthesis(
    DeepInversion(
        images=10,
        batch_size=4,
        regularizers=(Term("bn_feature", 1.0, BNFeature()), Term("js", 1.0, JSCompete())),
        stages=(Stage(2),),
        engine=Engine(precision="float32", compile=False),
    ),
    {"name": "deepinversion", "images": 10},
)


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn(), toys.card(weights_sha256="abc"))


def student_of(toys):
    student = toys.two_bn()
    with torch.no_grad():
        student.fc.weight.mul_(-1)
    return student


def teach(teacher, context, student, options=EVERY_THREE):
    with adaptive_pool(teacher, SYNTHESIS, context, student, options, compared=True) as pool:
        return train_student(teacher, student, pool, TRAINING, context, "training")


def stored(context):
    """Return what the store holds, but for the seconds that it took."""
    if not holds_dreams(context.folder / "dreams"):
        return {}
    store = DreamStore(context.folder / "dreams")
    assert store.damaged() == []
    return {index: replace(header, seconds=0.0) for index, header in store.shards.items()}


# --- the rhythm -------------------------------------------------------------------------------


class Planned:
    """A dreaming that dreams nothing: 10 images in batches of 4, 4 and 2."""

    plans = batch_plans(10, 4, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Adaptive(every=3, batches=1), {0: 1, 3: 2, 6: 3}),
        (Adaptive(every=1, batches=2), {0: 2, 1: 3}),
        (Adaptive(every=50, batches=9), {0: 3}),
    ],
)
def test_new_dreams_come_at_their_steps(options, expected):
    pool = AdaptivePool(options, Planned())
    assert pool.images == 10
    came = {}
    for step in range(12):
        if pool.due(step):
            pool.batches = min(pool.batches + options.batches, 3)
            came[step] = pool.batches
    assert came == expected


def test_each_batch_is_made_against_the_student_of_its_time_and_used_at_once(
    teacher, context, toys, monkeypatch
):
    student, seen, used = student_of(toys), [], []
    dream, step = Inversion.dream, Distiller.step

    def watch(self, plan, on_step):
        seen.append((plan.index, student.fc.weight.detach().clone()))
        return dream(self, plan, on_step)

    def count(self, batch, share):
        used.append(batch[0])
        return step(self, batch, share=share)

    monkeypatch.setattr(Inversion, "dream", watch)
    monkeypatch.setattr(Distiller, "step", count)
    pool = teach(teacher, context, student)
    assert [index for index, _ in seen] == [0, 1, 2]
    weights = [w for _, w in seen]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert len(pool) == 10
    assert len(used) == 12
    newest, _ = pool.batch(range(4, 8))
    assert sorted(x.sum().item() for x in used[3]) == sorted(x.sum().item() for x in newest)
    assert context.log.metrics["training.steps"] == 12


def test_what_is_held_back_of_each_batch_is_never_taught(teacher, context, toys, monkeypatch):
    monkeypatch.setattr(samples, "LEAST", 2)
    monkeypatch.setattr(samples, "ONE_IN", 4)
    student, used, step = student_of(toys), [], Distiller.step

    def count(self, batch, share):
        used.extend(batch[0])
        return step(self, batch, share=share)

    monkeypatch.setattr(Distiller, "step", count)
    with adaptive_pool(teacher, SYNTHESIS, context, student, EVERY_THREE, compared=True) as pool:
        train_student(teacher, student, pool, TRAINING, context, "training")
    parts = pool.parts
    assert (len(parts.fitted), len(parts.compared), pool.images) == (8, 2, 8)
    assert parts.apart
    whole, _ = DreamStore(context.folder / "dreams").open().batch(samples.held_back(10, 3))
    assert torch.equal(parts.compared.batch(range(2))[0], whole)
    taught = {image.numpy().tobytes() for image in used}
    assert len(taught) == 8
    assert not taught & {image.numpy().tobytes() for image in whole}


def test_rounds_dream_several_batches_against_one_student(teacher, context, toys, monkeypatch):
    student, seen, dream = student_of(toys), [], Inversion.dream

    def watch(self, plan, on_step):
        seen.append(student.fc.weight.detach().clone())
        return dream(self, plan, on_step)

    monkeypatch.setattr(Inversion, "dream", watch)
    teach(teacher, context, student, Adaptive(every=6, batches=2))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    ("options", "needed"),
    [(Adaptive(every=6, batches=1), 13), (Adaptive(every=12, batches=2), 13)],
)
def test_a_training_too_short_for_its_dreams_says_how_long_it_must_be(options, needed):
    pool = AdaptivePool(options, Planned())
    pool.check(needed)
    with pytest.raises(DreamkitError, match=f"before step {needed}, and the training has 12") as e:
        pool.check(12)
    assert e.value.path == ("training",)


# --- kill and resume --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["first dream", "later dream", "training", "after"])
def test_a_killed_run_ends_with_the_same_pool_and_student(
    toys, teacher, tmp_path, monkeypatch, where
):
    monkeypatch.setattr(samples, "LEAST", 2)
    monkeypatch.setattr(samples, "ONE_IN", 4)
    whole = toys.context(tmp_path / "whole")
    expected = student_of(toys)
    pool = teach(teacher, whole, expected)

    parts = toys.context(tmp_path / "parts")
    dream, step = Inversion.dream, Distiller.step
    monkeypatch.setattr(training_run, "CHECKPOINT_SECONDS", 0.0 if where == "training" else 60.0)

    def kill_dream(self, plan, on_step):
        if plan.index == {"first dream": 0, "later dream": 2}.get(where):
            raise KeyboardInterrupt
        return dream(self, plan, on_step)

    def kill_step(self, batch, share):
        if self.done == {"training": 5, "after": 11}.get(where):
            raise KeyboardInterrupt
        return step(self, batch, share=share)

    with monkeypatch.context() as patched:
        patched.setattr(Inversion, "dream", kill_dream)
        patched.setattr(Distiller, "step", kill_step)
        with pytest.raises(KeyboardInterrupt):
            teach(teacher, parts, student_of(toys))
    before = stored(parts)
    student = student_of(toys)
    again = teach(teacher, parts, student)
    assert before.items() <= stored(parts).items()
    assert stored(parts) == stored(whole)
    assert torch.equal(again.batch(range(8))[0], pool.batch(range(8))[0])
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_a_finished_training_is_not_repeated(teacher, context, toys, monkeypatch):
    first, second = student_of(toys), student_of(toys)
    teach(teacher, context, first)
    monkeypatch.setattr(Distiller, "step", None)
    teach(teacher, context, second)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert any("going on from step 12 of 12" in note for note in context.log.notes)


def test_a_batch_that_is_gone_from_under_a_checkpoint_is_named(teacher, context, toys):
    teach(teacher, context, student_of(toys))
    (context.folder / "dreams" / "shard-000001.safetensors").unlink()
    with pytest.raises(DreamkitError, match=r"batch 1 .* is gone.*checkpoints"):
        teach(teacher, context, student_of(toys))


def test_a_batch_that_overflows_is_left_out_of_the_pool(teacher, context, toys, monkeypatch):
    dream = Inversion.dream

    def overflow(self, plan, on_step):
        if plan.index == 1:
            raise NonFiniteLoss("the loss of batch 1 is not finite")
        return dream(self, plan, on_step)

    monkeypatch.setattr(Inversion, "dream", overflow)
    assert len(teach(teacher, context, student_of(toys))) == 6
    assert sorted(DreamStore(context.folder / "dreams").shards) == [0, 2]


def test_a_checkpoint_of_another_training_is_refused(teacher, context, toys, monkeypatch):
    monkeypatch.setattr(training_run, "CHECKPOINT_SECONDS", 0.0)
    teach(teacher, context, student_of(toys))
    teacher.card = toys.card(weights_sha256="another")
    images, student = toys.images(10), student_of(toys)
    with pytest.raises(StoreError, match=r"is of a training with.*delete it"):
        train_student(teacher, student, images, TRAINING, context, "training")


def test_weights_that_are_not_finite_are_not_kept(teacher, context, toys):
    student = student_of(toys)
    wild = Distillation(steps=12, batch_size=4, lr=1e30, precision="float32")
    with pytest.raises(DreamkitError, match="not finite"):
        train_student(teacher, student, toys.images(10), wild, context, "training")
    assert not (context.folder / "checkpoints").exists()


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "b": shared.t(), "c": torch.tensor(3)}
    write_checkpoint(tmp_path / "x" / "t.safetensors", tensors, {"batches": 2})
    state, facts = read_checkpoint(tmp_path / "x" / "t.safetensors")
    assert facts == {"batches": 2}
    assert state.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(state[name], value)


def test_no_checkpoint_is_none(tmp_path):
    assert read_checkpoint(tmp_path / "t.safetensors") is None


@pytest.mark.parametrize("damage", ["bit", "cut", "foreign"])
def test_a_damaged_checkpoint_is_refused_with_the_fix(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    write_checkpoint(path, {"a": torch.zeros(64)}, {})
    blob = bytearray(path.read_bytes())
    if damage == "bit":
        blob[-1] ^= 1
    elif damage == "cut":
        del blob[-10:]
    else:
        blob = bytearray(json.dumps({"not": "safetensors"}).encode())
    path.write_bytes(blob)
    with pytest.raises(StoreError, match="delete it"):
        read_checkpoint(path)


# --- the pool ---------------------------------------------------------------------------------


def test_a_pool_grows_and_keeps_its_order(toys):
    images = toys.images(9)
    pool = Pool()
    assert len(pool) == 0
    for first, last in ((0, 2), (2, 3), (3, 9)):
        part = StoredImages(images.images[first:last], images.labels[first:last])
        pool.add(part)
        assert len(pool) == last
    chosen = [8, 0, 3, 3]
    found, labels = pool.batch(chosen)
    assert torch.equal(found, images.images[chosen])
    assert torch.equal(labels, images.labels[chosen])
    with pytest.raises(IndexError):
        pool.batch([9])
