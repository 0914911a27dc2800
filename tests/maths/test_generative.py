"""The generator methods: DAFL, FastDFKD, CMI, NAYER."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from dreamkit.errors import NonFiniteLoss, TeacherMismatch
from dreamkit.registry import Term
from dreamkit.regularizers.activation import Activation
from dreamkit.regularizers.adversarial import Adversarial
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.information_entropy import InformationEntropy
from dreamkit.regularizers.one_hot import OneHot
from dreamkit.synthesizers.cmi import CMI, info_nce, random_resized_crop
from dreamkit.synthesizers.dafl import DAFL
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.fast_meta import FastMeta
from dreamkit.synthesizers.generator_network import Generator
from dreamkit.synthesizers.nayer import NAYER, NoisyLayers, label_embeddings
from dreamkit.synthesizers.smoothed_statistics import SmoothedStatistics
from dreamkit.types import BatchPlan, LayerStatistics

CPU = torch.device("cpu")
COMMON = {
    "images": 12,
    "batch_size": 4,
    "latent": 5,
    "width": 4,
    "engine": Engine(precision="float32", compile=False),
}
BN = Term("bn_feature", 1.0, BNFeature())
RIVAL = Term("adversarial", 1.0, Adversarial())
METHODS = {
    "dafl": DAFL(
        regularizers=(
            Term("one_hot", 1.0, OneHot()),
            Term("information_entropy", 5.0, InformationEntropy()),
            Term("activation", 0.1, Activation()),
        ),
        steps=2,
        **COMMON,
    ),
    "fast_meta": FastMeta(regularizers=(BN, RIVAL), steps=3, warmup=1, **COMMON),
    "reptile": FastMeta(regularizers=(BN,), steps=3, meta="reptile", **COMMON),
    "cmi": CMI(regularizers=(BN, RIVAL), steps=3, bank=6, **COMMON),
    "nayer": NAYER(regularizers=(BN, RIVAL), steps=3, warmup=1, **COMMON),
}
methods = pytest.mark.parametrize("name", METHODS)


def plan(index=0, seed=7, size=4):
    return BatchPlan(index, index * size, size, seed + index)


def nothing(done, terms):
    pass


# --- what all of them keep to -----------------------------------------------------------------


@methods
def test_a_batch_is_what_was_planned(toys, name):
    steps = []
    with METHODS[name].session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn()) as dreamer:
        assert dreamer.batch_size == 4
        found = dreamer.dream(plan(), lambda done, terms: steps.append((done, set(terms))))
    assert found.images.shape == (4, 3, 8, 8)
    assert found.labels.shape == (4,)
    assert math.isfinite(found.loss)
    low, high = toys.card().pixel_range(found.images)
    assert (found.images >= low).all()
    assert (found.images <= high).all()
    assert [done for done, _ in steps] == list(range(1, METHODS[name].steps_per_batch + 1))
    assert "loss" in steps[0][1]


@methods
def test_batches_build_on_one_another_and_go_on_from_a_state(toys, name):
    def session():
        return METHODS[name].session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn())

    with session() as dreamer:
        whole = [dreamer.dream(plan(index), nothing).images for index in range(3)]
    with session() as dreamer:
        dreamer.dream(plan(0), nothing)
        dreamer.dream(plan(1), nothing)
        state = {key: value.clone() for key, value in dreamer.state().items()}
    with session() as dreamer:
        dreamer.prepare(8)
        dreamer.restore(state)
        assert torch.equal(dreamer.dream(plan(2), nothing).images, whole[2])
    with session() as dreamer:
        dreamer.prepare(12)
        assert torch.equal(dreamer.dream(plan(0), nothing).images, whole[0]), (
            "preparing left a trace"
        )
        fresh = dreamer.dream(plan(2), nothing).images
    assert not torch.equal(fresh, whole[2]), "without batch 1 batch 2 is another"


@methods
def test_teacher_and_student_are_left_as_they_were(toys, name):
    teacher, student = toys.two_bn().train(), toys.two_bn().train()
    before, rival = toys.state(teacher), toys.state(student)
    with METHODS[name].session(toys.teacher(teacher), CPU, student=student) as dreamer:
        dreamer.prepare(4)
        dreamer.dream(plan(1), nothing)
        toys.assert_same_state(student, rival)
    toys.assert_same_state(teacher, before)


@methods
def test_a_batch_that_overflows_leaves_the_generator_as_it_was(toys, name):
    teacher = toys.two_bn()
    with METHODS[name].session(toys.teacher(teacher), CPU, student=toys.two_bn()) as dreamer:
        before = {key: value.clone() for key, value in dreamer.state().items()}
        bias = teacher.fc.bias.detach().clone()
        with torch.no_grad():
            teacher.fc.bias.fill_(math.nan)
        with pytest.raises(NonFiniteLoss, match="batch 0"):
            dreamer.dream(plan(), nothing)
        with torch.no_grad():
            teacher.fc.bias.copy_(bias)
        after = dreamer.state()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_competes_says_so():
    assert METHODS["dafl"].needs_student is None
    assert METHODS["cmi"].needs_student == "adversarial"


def test_statistics_of_a_teacher_without_any_are_refused(toys):
    with pytest.raises(TeacherMismatch, match="no BatchNorm"):
        METHODS["cmi"].check(toys.teacher(toys.plain()))


def test_features_of_a_teacher_without_a_linear_layer_are_refused(toys):
    with pytest.raises(TeacherMismatch, match="calls none") as caught:
        METHODS["dafl"].check(toys.teacher(toys.conv_head()))
    assert caught.value.path == ("regularizers", 2)


# --- the generator ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 7, 10)])
def test_a_generator_makes_pixels_of_any_size(shape):
    made = Generator(5, 4, shape)(torch.randn(3, 5))
    assert made.shape == (3, *shape)
    assert made.min() > 0
    assert made.max() < 1


# --- each method's own ------------------------------------------------------------------------


def test_dafl_labels_are_the_teachers_choices(toys):
    model = toys.two_bn()
    with METHODS["dafl"].session(toys.teacher(model), CPU) as dreamer:
        found = dreamer.dream(plan(), nothing)
    assert torch.equal(found.labels, model(found.images).argmax(1))


@methods
def test_what_outlives_a_batch_is_drawn_by_the_runs_seed(toys, name):
    states = []
    for seed in (3, 4, 3):
        teacher, student = toys.teacher(toys.two_bn()), toys.two_bn()
        with METHODS[name].session(teacher, CPU, student=student, seed=seed) as dreamer:
            states.append({key: value.clone() for key, value in dreamer.state().items()})
    (weight,) = (key for key in states[0] if key.endswith((".project.weight", "head.0.weight")))
    assert torch.equal(states[0][weight], states[2][weight])
    assert not torch.equal(states[0][weight], states[1][weight])


def test_maml_steps_by_the_sum_of_the_inner_gradients(toys):
    options = METHODS["fast_meta"]
    with options.session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn()) as dreamer:
        before = dreamer.generator.last.bias.detach().clone()
        dreamer.dream(plan(), nothing)
        gradient = dreamer.generator.last.bias.grad
        moved = dreamer.generator.last.bias.detach() - before
    # Adam's first step is the learning rate against the gradient's sign, here 3 times 3e-3.
    torch.testing.assert_close(moved, -9e-3 * gradient.sign(), rtol=1e-3, atol=1e-7)


def test_reptile_goes_a_tenth_of_the_way_to_the_copy(toys, monkeypatch):
    copies = []
    learn = METHODS["reptile"].dreamer._learn

    def watch(self, fast):
        copies.append(fast.last.bias.detach().clone())
        learn(self, fast)

    monkeypatch.setattr(METHODS["reptile"].dreamer, "_learn", watch)
    with METHODS["reptile"].session(toys.teacher(toys.two_bn()), CPU) as dreamer:
        before = dreamer.generator.last.bias.detach().clone()
        dreamer.dream(plan(), nothing)
        after = dreamer.generator.last.bias.detach()
    torch.testing.assert_close(after, before + 0.1 * (copies[0] - before))


@pytest.mark.parametrize("name", ["fast_meta", "nayer"])
def test_the_student_counts_from_the_batch_that_the_warm_up_names(toys, name):
    terms, options = {}, dataclasses.replace(METHODS[name], warmup=2)
    with options.session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn()) as dreamer:
        assert dreamer.first_whole_batch == 1
        for index in (0, 1):
            dreamer.dream(
                plan(index), lambda done, found, index=index: terms.update({index: found})
            )
    assert "adversarial" not in terms[0]
    assert "adversarial" in terms[1]


# --- NAYER --------------------------------------------------------------------------------------


@contextmanager
def adaptations(toys, **changes):
    """Yield a dreamer of NAYER and what each of its batches began with."""
    begun = []
    options = dataclasses.replace(METHODS["nayer"], **changes)
    with options.session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn()) as dreamer:
        adapt = dreamer.adapt

        def seen(plan, adaptation, *others):
            noisy, generator = adaptation.network
            weights = [noisy.weight, generator.project.weight]
            start = [weight.detach().clone() for weight in weights]
            begun.append((*start, adaptation.inputs, noisy(adaptation.inputs).detach()))
            return adapt(plan, adaptation, *others)

        dreamer.adapt = seen
        yield dreamer, begun


def test_noisy_layers_by_hand():
    noisy = NoisyLayers(torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]), 2, 1)
    with torch.no_grad():
        noisy.weight.copy_(torch.tensor([[[1.0], [9.0]], [[-2.0], [9.0]]]))
        noisy.bias.copy_(torch.tensor([[[0.0]], [[10.0]]]))
    # Over the classes the first number has mean 3 and variance 8/3, the second says nothing.
    z = math.sqrt(3 / 2)
    found = noisy(torch.tensor([0, 1, 2, 3, 5]))  # classes 0, 1, 2, then 0 and 2 of layer 1
    expected = torch.tensor([-z, 0.0, z, 10 + 2 * z, 10 - 2 * z])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-3, atol=1e-3)


def test_noise_is_drawn_anew_for_each_batch_by_its_seed(toys):
    with adaptations(toys) as (dreamer, begun):
        dreamer.dream(plan(0), nothing)
        dreamer.dream(plan(2), nothing)
        dreamer.dream(plan(0), nothing)
    layers = [start[0] for start in begun]
    assert torch.equal(layers[0], layers[2])
    size = min(map(len, layers))
    assert not torch.isclose(layers[0][:size], layers[1][:size]).any()


def test_images_of_a_class_go_through_layers_of_their_own(toys):
    with adaptations(toys) as (dreamer, begun):
        found = [dreamer.dream(plan(index, size=5), nothing) for index in range(3)]
    for (layers, _, places, inputs), dream in zip(begun, found, strict=True):
        assert torch.equal(places % 3, dream.labels)
        assert places.unique().numel() == 5
        assert places.max() // 3 == len(layers) - 1, "a layer is used by none"
        assert torch.pdist(inputs).min() > 1e-3
    labels = torch.cat([dream.labels for dream in found])
    assert labels.bincount().tolist() == [5, 5, 5]


def test_embeddings_are_the_rows_of_the_classifier(toys):
    model = toys.two_bn()
    embeddings = label_embeddings(toys.teacher(model))
    assert torch.equal(embeddings, model.fc.weight)
    with METHODS["nayer"].session(toys.teacher(model), CPU, student=toys.two_bn()) as dreamer:
        dreamer.dream(plan(), nothing)
        assert torch.equal(dreamer.embeddings, embeddings)


def test_the_noisy_layers_learn_with_the_generator(toys, monkeypatch):
    made = []
    monkeypatch.setattr(
        "dreamkit.synthesizers.nayer.NoisyLayers",
        lambda *given: made.append(NoisyLayers(*given)) or made[-1],
    )
    with adaptations(toys, steps=1) as (dreamer, begun):
        dreamer.dream(plan(), nothing)
    ((before, *_),) = begun
    # Adam's first step is the learning rate.
    moved = (made[0].weight.detach() - before).abs()
    assert moved.max().item() == pytest.approx(4e-3, rel=1e-3)


def test_the_generator_is_drawn_anew_when_it_is_due(toys):
    def generators(*indices, **changes):
        with adaptations(toys, **changes) as (dreamer, begun):
            for index in indices:
                dreamer.dream(plan(index), nothing)
        return [start[1] for start in begun]

    whole = generators(0, 1, 2, 3, reset_every=2)
    assert torch.equal(whole[2], generators(2, reset_every=2)[0]), "it remembers those before"
    assert not torch.equal(whole[1], whole[0])
    assert not torch.equal(whole[2], whole[0]), "each is another"
    assert not torch.equal(whole[3], whole[2])
    never = generators(0, 1, 2, 3, reset_every=None)
    assert torch.equal(never[1], whole[1])
    assert not torch.equal(never[2], whole[2])


def test_a_generator_that_is_due_comes_after_a_batch_that_overflows_too(toys):
    with adaptations(toys, reset_every=2) as (dreamer, begun):
        dreamer.dream(plan(0), nothing)
        weight = dreamer.embeddings.clone()
        dreamer.embeddings.fill_(math.nan)
        with pytest.raises(NonFiniteLoss, match="batch 2"):
            dreamer.dream(plan(2), nothing)
        dreamer.embeddings.copy_(weight)
        assert dreamer.state()["life"] == 0
        dreamer.dream(plan(3), nothing)
    with adaptations(toys, reset_every=2) as (dreamer, fresh):
        dreamer.dream(plan(3), nothing)
    assert torch.equal(begun[-1][1], fresh[0][1])


def test_a_generators_life_goes_on_from_a_state(toys):
    def session():
        options = dataclasses.replace(METHODS["nayer"], reset_every=2)
        return options.session(toys.teacher(toys.two_bn()), CPU, student=toys.two_bn())

    with session() as dreamer:
        whole = [dreamer.dream(plan(index), nothing).images for index in range(5)]
    for done in range(1, 5):
        with session() as dreamer:
            for index in range(done):
                dreamer.dream(plan(index), nothing)
            state = {key: value.clone() for key, value in dreamer.state().items()}
        with session() as dreamer:
            dreamer.restore(state)
            assert torch.equal(dreamer.dream(plan(done), nothing).images, whole[done])


def test_a_teacher_without_embeddings_is_refused(toys):
    check = dataclasses.replace(METHODS["nayer"], regularizers=()).check
    with pytest.raises(
        TeacherMismatch, match=r"toy calls none; fast_meta, cmi and dafl do without"
    ):
        check(toys.teacher(toys.conv_head()))
    with pytest.raises(TeacherMismatch, match="'fc' of toy has 3 for 2 classes"):
        check(toys.teacher(toys.two_bn(), toys.card(classes=2)))
    with pytest.raises(TeacherMismatch, match="toy has one class"):
        check(toys.teacher(toys.two_bn(classes=1), toys.card(classes=1)))


def test_smoothed_statistics_by_hand():
    def layer(mean, var):
        own = torch.zeros(1), torch.ones(1)
        return (LayerStatistics("bn", torch.tensor([mean]), torch.tensor([var]), *own),)

    # What is stored, mean 0 and variance 1, stands for the batches before the first.
    smoothed = SmoothedStatistics(0.75, layer(0.0, 0.0))
    (first,) = smoothed.blended(layer(4.0, 9.0))
    assert (first.mean.item(), first.var.item()) == (1, 3)
    smoothed.update(layer(4.0, 9.0))
    (second,) = smoothed.blended(layer(5.0, 7.0))
    assert (second.mean.item(), second.var.item()) == (2, 4)
    smoothed.update(layer(5.0, 7.0))
    other = SmoothedStatistics(0.75, layer(0.0, 0.0))
    other.restore(smoothed.state(), CPU)
    (third,) = other.blended(layer(2.0, 4.0))
    assert (third.mean.item(), third.var.item()) == (2, 4)


def test_the_bank_keeps_the_newest_images(toys):
    model = toys.two_bn()
    with METHODS["cmi"].session(toys.teacher(model), CPU, student=toys.two_bn()) as dreamer:
        for index in range(2):
            found = dreamer.dream(plan(index), nothing)
        bank = dreamer.state()["bank"]
    assert bank.shape == (6, 10)  # 4 + 6 channels at two layers
    first = model.conv1(found.images).mean((2, 3))
    torch.testing.assert_close(bank[:4, :4], first, rtol=1e-4, atol=1e-5)


def test_info_nce_by_hand():
    local = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    # Similarities over ½: (2, 0, -2) with the first its own, and (0, 2, 0) with the second.
    one = -math.log(math.e**2 / (math.e**2 + 1 + math.e**-2))
    two = -math.log(math.e**2 / (math.e**2 + 2))
    assert info_nce(local, others, 0.5).item() == pytest.approx((one + two) / 2, rel=1e-5)


def test_a_crop_of_the_whole_is_the_image(toys):
    images = torch.randn(3, 2, 6, 6)
    whole = random_resized_crop(images, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole, images, rtol=1e-4, atol=1e-5)


def test_crops_are_parts_of_their_images():
    ramp = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(64, 1, 16, 16)
    parts = random_resized_crop(ramp, 0.25, torch.Generator().manual_seed(0))
    widths = (parts[..., -1] - parts[..., 0]).mean((1, 2))
    assert parts.min() >= 0
    assert parts.max() <= 1
    # Half to all of the side, and nearly 15/16 of the way from centre to centre at the most.
    assert widths.min() > 0.4
    assert widths.max() < 1.0
    assert widths.max() - widths.min() > 0.3


# --- their terms ------------------------------------------------------------------------------


def test_every_term_of_dafl_by_hand(toys):
    model = toys.two_bn()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with METHODS["dafl"].session(toys.teacher(model), CPU) as dreamer:
        terms = dreamer.terms(x, torch.zeros(4).long())
    logits = model(x)
    p = logits.softmax(1)
    features = F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))).mean((2, 3))
    entropy = -(p.mean(0) * p.mean(0).log10()).sum()
    assert terms["cross_entropy"].item() == 0
    assert terms["one_hot"].item() == pytest.approx(-p.max(1).values.log().mean().item(), rel=1e-4)
    assert terms["information_entropy"].item() == pytest.approx(-5 * entropy.item(), rel=1e-4)
    assert terms["activation"].item() == pytest.approx(-0.1 * features.mean().item(), rel=1e-4)
