"""Several synthesizers in one run: whose turn it is, and that none disturbs another."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from dreamkit.errors import DreamkitError, NonFiniteLoss, OptionError, TeacherMismatch
from dreamkit.recipe.shares import without_shares
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.regularizers.one_hot import OneHot
from dreamkit.seeds import derived_seed
from dreamkit.stages.adaptive import Adaptive, adaptive_pool
from dreamkit.stages.batches import batch_seed, doubts_of, known_batches
from dreamkit.stages.dreaming import dream_into_store, estimate_synthesis
from dreamkit.store.dreams import DreamStore
from dreamkit.synthesizers.cmi import CMI
from dreamkit.synthesizers.dafl import DAFL
from dreamkit.synthesizers.deepinversion import DeepInversion, Inversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.mixed import Mixed, apportioned, turns
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Synthesis, with_images

CPU = torch.device("cpu")
EAGER = Engine(precision="float32", compile=False)
BN = Term("bn_feature", 1.0, BNFeature())
SLOW = DeepInversion(images=12, batch_size=3, regularizers=(BN,), stages=(Stage(4),), engine=EAGER)
GENERATED = {"latent": 5, "width": 4, "steps": 2, "engine": EAGER}
QUICK = DAFL(images=8, batch_size=4, regularizers=(Term("one_hot", 1.0, OneHot()), BN), **GENERATED)
CONTRASTED = CMI(images=8, batch_size=4, regularizers=(BN,), bank=6, **GENERATED)


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn(), toys.card(weights_sha256="abc"))


def nothing(done, terms):
    pass


# --- whose turn it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "shares", "parts"),
    [
        (8, [1, 1], [4, 4]),
        (8, [3, 1], [6, 2]),
        (10, [1, 1, 1], [4, 3, 3]),  # what is left over goes to the first of equals
        (10, [1, 2, 1], [3, 5, 2]),
        (3, [100, 1], [3, 0]),
        (7, [3, 4], [3, 4]),
        (6, [1e308, 1e308], [3, 3]),
        (1000, [0.1, 0.2, 0.7], [100, 200, 700]),
    ],
)
def test_images_are_divided_by_shares(images, shares, parts):
    assert apportioned(images, shares) == parts


def test_turns_by_hand():
    # Of 6 in threes and 8 in fours: both have nothing, the other has nothing, both have half.
    assert turns([6, 8], [3, 4]) == [
        (0, BatchPlan(0, 0, 3, 0)),
        (1, BatchPlan(0, 0, 4, 0)),
        (0, BatchPlan(1, 3, 3, 0)),
        (1, BatchPlan(1, 4, 4, 0)),
    ]


def test_small_batches_come_in_a_row_and_rests_are_made():
    found = turns([8, 9], [2, 8])
    assert [(who, plan.size) for who, plan in found] == [
        *((0, 2), (1, 8), (0, 2), (0, 2), (0, 2), (1, 1)),
    ]
    assert [plan.first_image for who, plan in found if who == 0] == [0, 2, 4, 6]


def test_each_makes_its_own_images_unless_shares_are_given():
    def parts(**options):
        return [member.images for member in Mixed((SLOW, QUICK), **options).members]

    assert parts() == [12, 8]
    assert parts(shares=(1.0, 1.0)) == [10, 10]
    assert parts(shares=(1.0, 3.0), images=8) == [2, 6]
    assert parts(images=40) == [24, 16]
    many = with_images(Mixed((SLOW, QUICK)), 5)
    assert [member.images for member in many.members] == [3, 2]
    assert [m.images for m in with_images(Mixed((SLOW, QUICK), (9.0, 1.0)), 2).members] == [2]


def test_what_the_list_knows_of_its_members(teacher):
    mixed = Mixed((SLOW, QUICK))
    assert mixed.images == 20
    assert mixed.steps_per_batch == 4
    assert known_batches(mixed, teacher) == 6
    assert mixed.image_size(teacher) == (8, 8)
    settled_later = Mixed((replace(SLOW, batch_size="auto"), QUICK))
    assert known_batches(settled_later, teacher) is None


# --- none disturbs another --------------------------------------------------------------------


def alone(member, place, teacher, plans, student=None):
    """Return what a synthesizer makes by itself of plans."""
    seed = derived_seed(3, f"synthesizer {place}")
    with member.session(teacher, CPU, seed=seed, student=student) as dreamer:
        return [dreamer.dream(plan, nothing) for plan in plans]


def plans_of(dreamer):
    return [BatchPlan(i, 0, size, batch_seed(3, i)) for i, size in enumerate(dreamer.batch_sizes)]


def own_plans(mixed, dreamer):
    """Return the plans that each member is to see."""
    parts = [member.images for member in mixed.members]
    found = [[] for _ in parts]
    for index, (who, plan) in enumerate(turns(parts, [d.batch_size for d in dreamer.dreamers])):
        found[who].append(replace(plan, seed=batch_seed(3, index)))
    return found


@pytest.mark.parametrize("competing", [False, True])
def test_each_dreams_what_it_would_alone(toys, teacher, competing):
    slow = replace(SLOW, regularizers=(BN, Term("js", 1.0, JSCompete()))) if competing else SLOW
    student = toys.two_bn() if competing else None
    other = replace(SLOW, regularizers=(), lr=0.3, parameterisation=SLOW.parameterisation)
    mixed = Mixed((slow, QUICK, CONTRASTED, other))
    with mixed.session(teacher, CPU, seed=3, student=student) as dreamer:
        dreamer.prepare(mixed.images)
        found = [[] for _ in mixed.of]
        for plan, (who, _) in zip(plans_of(dreamer), dreamer._turns, strict=True):
            found[who].append(dreamer.dream(plan, nothing))
        own = own_plans(mixed, dreamer)
    for place, (member, plans) in enumerate(zip(mixed.of, own, strict=True)):
        expected = alone(member, place, teacher, plans, student)
        assert len(found[place]) == len(expected) > 1
        for got, wanted in zip(found[place], expected, strict=True):
            assert torch.equal(got.images, wanted.images), place
            assert torch.equal(got.labels, wanted.labels)
            assert got.loss == wanted.loss


@pytest.mark.slow
def test_compiled_ones_dream_what_they_would_alone(teacher):
    compiled = replace(SLOW, engine=Engine(precision="float32", compile=True))
    other = replace(compiled, lr=0.3)
    mixed = Mixed((compiled, other))
    with mixed.session(teacher, CPU, seed=3) as dreamer:
        dreamer.prepare(mixed.images)
        assert [c["compile"] for c in dreamer.choices["of"]] == [True, True]
        plans = plans_of(dreamer)
        found = [dreamer.dream(plan, nothing).images for plan in plans]
        own = own_plans(mixed, dreamer)
        whose = [who for who, _ in dreamer._turns]
    for place in (0, 1):
        mine = [images for who, images in zip(whose, found, strict=True) if who == place]
        seed = derived_seed(3, f"synthesizer {place}")
        with mixed.of[place].session(teacher, CPU, seed=seed) as one:
            one.prepare(12)
            for got, plan in zip(mine, own[place], strict=True):
                assert torch.equal(got, one.dream(plan, nothing).images)


def test_the_teacher_and_the_student_are_left_as_they_were(toys):
    teacher, student = toys.two_bn().train(), toys.two_bn().train()
    before, rival = toys.state(teacher), toys.state(student)
    mixed = Mixed((SLOW, QUICK, CONTRASTED))
    with mixed.session(toys.teacher(teacher), CPU, student=student) as dreamer:
        for plan in plans_of(dreamer)[:4]:
            dreamer.dream(plan, nothing)
        toys.assert_same_state(student, rival)
    toys.assert_same_state(teacher, before)


def test_steps_count_to_the_same_for_all(teacher):
    mixed = Mixed((SLOW, QUICK))
    with mixed.session(teacher, CPU) as dreamer:
        steps = [[], []]
        for plan, seen in zip(plans_of(dreamer), steps, strict=False):
            dreamer.dream(plan, lambda done, terms, seen=seen: seen.append(done))
    assert steps == [[1, 2, 3, 4], [2, 4]]


def test_all_are_watched(teacher):
    seen = []
    with Mixed((SLOW, QUICK)).session(teacher, CPU) as dreamer:
        dreamer.watch(lambda images, labels: seen.append(len(images)))
        for plan in plans_of(dreamer)[:2]:
            dreamer.dream(plan, nothing)
    assert seen == [3, 3, 3, 3, 4, 4]


def test_what_each_carries_on_is_kept_apart(teacher):
    mixed = Mixed((SLOW, QUICK, replace(QUICK, lr=0.1)))
    with mixed.session(teacher, CPU) as dreamer:
        plans = plans_of(dreamer)
        whole = [dreamer.dream(plan, nothing).images for plan in plans]
    with mixed.session(teacher, CPU) as dreamer:
        for plan in plans[:4]:
            dreamer.dream(plan, nothing)
        state = {key: value.clone() for key, value in dreamer.state().items()}
    assert {key.partition(".")[0] for key in state} == {"1", "2"}
    with mixed.session(teacher, CPU) as dreamer:
        dreamer.restore(state)
        for plan, images in zip(plans[4:], whole[4:], strict=True):
            assert torch.equal(dreamer.dream(plan, nothing).images, images)
    with Mixed((SLOW, SLOW)).session(teacher, CPU) as dreamer:
        assert dreamer.state() == {}, "then ranks share batches out"


# --- in a run ---------------------------------------------------------------------------------


def synthesis(*members, **options):
    return Synthesis(Mixed(members, **options), {"name": "mixed"})


def stored(folder):
    store = DreamStore(folder / "dreams")
    assert store.damaged() == []
    return {index: replace(header, seconds=0.0) for index, header in store.shards.items()}


@pytest.mark.parametrize("members", [(SLOW, QUICK), (SLOW, replace(SLOW, lr=0.3, batch_size=4))])
def test_an_interrupted_run_ends_as_one_that_is_not(toys, teacher, tmp_path, members, monkeypatch):
    whole, parts = toys.context(tmp_path / "whole"), toys.context(tmp_path / "parts")
    for context in (whole, parts):
        context.folder.mkdir()
    images = dream_into_store(teacher, synthesis(*members), whole)
    assert len(images) == sum(member.images for member in members)
    dream, calls = Inversion.dream, []

    def interrupted(self, plan, on_step):
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return dream(self, plan, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "dream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dream_into_store(teacher, synthesis(*members), parts)
    assert 0 < len(stored(parts.folder)) < len(stored(whole.folder))
    dream_into_store(teacher, synthesis(*members), parts)
    assert stored(parts.folder) == stored(whole.folder)


def test_the_cost_is_told_of_each_and_of_all(toys, teacher, tmp_path):
    context = toys.context(tmp_path)
    cost = estimate_synthesis(teacher, synthesis(SLOW, QUICK), context)
    of_each = [note for note in context.log.notes if note.startswith("of[")]
    assert [note.partition(": about")[0] for note in of_each] == [
        *("of[0]: 12 images, 3 together", "of[1]: 8 images, 4 together"),
    ]
    (told,) = [note for note in context.log.notes if note.startswith("dreaming")]
    assert told.startswith("dreaming 20 images in 6 batches: about")
    assert cost.seconds > 0


def test_a_batch_that_overflows_says_whose_it_was(toys, teacher, tmp_path, monkeypatch):
    context = toys.context(tmp_path)
    dream = Inversion.dream

    def overflowing(self, plan, on_step):
        if plan.index == 1:
            raise NonFiniteLoss("the loss of batch 1 is not finite")
        return dream(self, plan, on_step)

    monkeypatch.setattr(Inversion, "dream", overflowing)
    dream_into_store(teacher, synthesis(SLOW, QUICK), context)
    (told,) = [note for note in context.log.notes if "left out" in note]
    assert told == "batch 2 is left out: of[0]: the loss of batch 1 is not finite"
    assert len(stored(context.folder)) == 5


def test_a_student_in_training_is_given_dreams_of_all(toys, teacher, tmp_path):
    context = toys.context(tmp_path)
    rival = replace(SLOW, regularizers=(BN, Term("js", 1.0, JSCompete())))
    student, rhythm = toys.two_bn(), Adaptive(every=3)
    with adaptive_pool(teacher, synthesis(rival, QUICK), context, student, rhythm) as pool:
        assert pool.planned == 20
        pool.check(16)
        with pytest.raises(DreamkitError, match="the last of 6 batches"):
            pool.check(15)
        assert [pool.dream() for _ in range(6)] == [3, 4, 3, 3, 4, 3]
        assert not pool.due(1000)


def test_doubts_are_of_each_ones_own_batches(teacher):
    lonely = replace(SLOW, images=13, batch_size=12)
    mixed = Mixed((lonely, QUICK))
    of_1000 = replace(teacher, card=replace(teacher.card, num_classes=1000))
    with mixed.session(teacher, CPU) as dreamer:
        (said,) = doubts_of(mixed, dreamer, teacher)
    assert said.startswith("images: 13 in batches of 12 leave 1 for the last")
    with mixed.session(teacher, CPU) as dreamer:  # DAFL's labels are drawn, whatever they are
        found = doubts_of(mixed, dreamer, of_1000)
    assert "images: 13 for 1000 classes: 13 are shown, 987 get no image" in found
    shown = Mixed((SLOW, replace(SLOW, images=1000)))
    with shown.session(teacher, CPU) as dreamer:
        assert not any("classes" in doubt for doubt in doubts_of(shown, dreamer, of_1000))


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"of": ()}, "of", "at least one"),
        ({"of": (SLOW, Mixed((QUICK,)))}, "of", "put all of them in one list"),
        ({"of": (SLOW, QUICK), "shares": (1.0,)}, "shares", "1 for 2 synthesizers"),
    ],
)
def test_a_list_that_cannot_be_is_refused(options, option, message):
    with pytest.raises(OptionError, match=message) as caught:
        Mixed(**options)
    assert caught.value.option == option


def test_images_of_different_sizes_are_refused(teacher):
    larger = replace(SLOW, stages=(Stage(1), Stage(1, size=12)))
    said = r"its images are 8x8 and those of 'of\[0\]' 12x12"
    with pytest.raises(TeacherMismatch, match=said) as caught:
        Mixed((larger, QUICK)).check(teacher)
    assert caught.value.path == ("of", 1)
    Mixed((larger, replace(larger, lr=0.3))).check(teacher)
    Mixed((replace(SLOW, stages=(Stage(1, size=12), Stage(1))), QUICK)).check(teacher)


def test_images_that_are_not_of_the_size_that_was_said_are_refused(teacher, monkeypatch):
    dream = Inversion.dream

    def small(self, plan, on_step):
        made = dream(self, plan, on_step)
        return dataclasses.replace(made, images=made.images[..., :4])

    monkeypatch.setattr(Inversion, "dream", small)
    refused = pytest.raises(DreamkitError, match=r"its images are \(8, 4\)")
    with Mixed((SLOW, QUICK)).session(teacher, CPU) as dreamer, refused as caught:
        dreamer.dream(plans_of(dreamer)[0], nothing)
    assert caught.value.path == ("of", 0)


def test_what_does_not_fit_a_teacher_is_placed_at_its_member(teacher):
    wrong = replace(SLOW, labels=(0, 99))
    with pytest.raises(TeacherMismatch, match="label 99") as caught:
        Mixed((QUICK, wrong)).check(teacher)
    assert caught.value.path == ("of", 1, "labels")


def test_the_first_that_needs_a_student_is_named():
    rival = replace(SLOW, regularizers=(Term("js_compete", 1.0, JSCompete()),))
    assert Mixed((QUICK, rival)).needs_student == "js_compete (of[1])"
    assert Mixed((QUICK, SLOW)).needs_student is None


def test_shares_beside_their_entries_by_hand():
    entries = [{"name": "a", "share": 3}, {"name": "b"}, "c"]
    assert without_shares(entries, 1.0) == ([{"name": "a"}, {"name": "b"}, "c"], [3, 1.0, 1.0])
    assert without_shares([{"name": "a"}, "c"], 1.0) == ([{"name": "a"}, "c"], None)
    assert math.isclose(entries[0]["share"], 3), "what was given stays"
