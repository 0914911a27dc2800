"""From a recipe's numbers to a filled store: plans, seeds, the judge, and resuming."""

from __future__ import annotations

import dataclasses
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import torch

from dreamkit import distributed
from dreamkit.errors import DreamkitError, NonFiniteLoss, StoreError, TeacherMismatch
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.stages import run_store
from dreamkit.stages.batches import (
    BatchQuality,
    as_stored,
    batch_plans,
    batch_seed,
    small_batches,
)
from dreamkit.stages.dreaming import (
    dream_into_store,
    estimate_synthesis,
    images_of,
)
from dreamkit.store.dreams import DreamStore
from dreamkit.store.source import Dreams, is_own_dreams
from dreamkit.synthesizers import dreamer
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Dream, Estimate, RunContext, Synthesis, Teacher
from dreamkit.wording import duration


@dataclass
class Counting:
    """DeepInversion that notes which batches were dreamed."""

    inner: DeepInversion
    dreamed: list = field(default_factory=list)
    stop_before: int | None = None
    overflow: tuple = ()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @contextmanager
    def session(self, teacher, device, choices=None, note=lambda text: None, student=None, seed=0):
        counting = self

        class Dreamer:
            def __init__(self, session):
                self.session = session

            def __getattr__(self, name):
                return getattr(self.session, name)

            def dream(self, plan, on_step):
                if plan.index == counting.stop_before:
                    raise KeyboardInterrupt
                if plan.index in counting.overflow:
                    raise NonFiniteLoss(f"the loss of batch {plan.index} is not finite")
                counting.dreamed.append(plan.index)
                return self.session.dream(plan, on_step)

        with self.inner.session(teacher, device, choices, note, student, seed) as session:
            yield Dreamer(session)


def synthesizer(images=7, batch_size=3, steps=2):
    return Counting(
        DeepInversion(
            images=images,
            batch_size=batch_size,
            regularizers=(Term("bn_feature", 1.0, BNFeature()),),
            stages=(Stage(steps),),
        )
    )


@dataclass
class Run:
    """What a run dreams of whom, and where."""

    teacher: Teacher
    synthesizer: object
    context: RunContext
    settings: dict = field(default_factory=lambda: {"name": "deepinversion", "images": 7})

    @property
    def synthesis(self):
        return Synthesis(self.synthesizer, self.settings)

    @property
    def folder(self):
        return self.context.folder

    @property
    def log(self):
        return self.context.log

    @property
    def metrics(self):
        return self.context.log.metrics

    def dream(self):
        return dream_into_store(self.teacher, self.synthesis, self.context)

    def estimate(self, student=None):
        return estimate_synthesis(self.teacher, self.synthesis, self.context, student)


@pytest.fixture
def run(toys, tmp_path):
    teacher = toys.teacher(toys.two_bn(), toys.card(weights_sha256="abc"))
    return Run(teacher, synthesizer(), toys.context(tmp_path))


def shards(run):
    return {p.name: p.read_bytes() for p in (run.folder / "dreams").glob("*.safetensors")}


# --- plans and seeds --------------------------------------------------------------------------


def test_batch_plans_by_hand():
    plans = batch_plans(7, 3, seed=11)
    assert [(p.index, p.first_image, p.size) for p in plans] == [(0, 0, 3), (1, 3, 3), (2, 6, 1)]
    assert [p.seed for p in plans] == [batch_seed(11, i) for i in range(3)]


def test_batch_plans_without_a_remainder():
    assert [p.size for p in batch_plans(6, 3, 0)] == [3, 3]
    assert [p.size for p in batch_plans(2, 3, 0)] == [2]


def test_a_longer_run_begins_with_the_batches_of_a_shorter_one():
    short, long = batch_plans(6, 3, 5), batch_plans(12, 3, 5)
    assert long[:2] == short


@pytest.mark.parametrize(
    ("seed", "index", "expected"),
    [
        # The first 8 bytes of SHA-256("<seed>:<index>"), big-endian, without the lowest bit.
        (0, 0, 6213027144842677344),
        (0, 1, 8613600020916457518),
        (7, 3, 616456930342725979),
    ],
)
def test_batch_seed_is_stable(seed, index, expected):
    assert batch_seed(seed, index) == expected


def test_batch_seeds_are_distinct_and_fit_a_generator():
    seeds = {batch_seed(seed, index) for seed in range(40) for index in range(200)}
    assert len(seeds) == 40 * 200
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize(
    ("images", "batch_size", "said"),
    [
        (33, 32, "leave 1 for the last.*: 32 or 64 fill it"),
        (71, 64, "leave 7 for the last.*: 64 or 128 fill it"),
        (5, 4, "leave 1 for the last.*: 4 or 8 fill it"),  # a quarter, but alone
        (40, 32, None),  # a quarter of a batch
        (64, 32, None),
        (7, 32, None),  # all there are
        (1, 32, "dreamed one by one"),
        (5, 1, "dreamed one by one"),
    ],
)
def test_batches_too_small_for_statistics_are_said(toys, images, batch_size, said):
    teacher = toys.teacher(toys.two_bn())
    found = small_batches(synthesizer(images), batch_size, teacher)
    assert found is None if said is None else re.search(said, found)
    without = DeepInversion(images=images, regularizers=(), stages=(Stage(1),))
    assert small_batches(without, batch_size, teacher) is None
    left_open = DeepInversion(images=images, stages=(Stage(1),))
    assert small_batches(left_open, batch_size, teacher) == found
    assert small_batches(left_open, batch_size, toys.teacher(toys.plain())) is None


def test_a_small_last_batch_is_noted_and_left_out_of_the_distances(run):
    run.synthesizer = synthesizer(images=6, batch_size=5)
    run.dream()
    assert any("leave 1 for the last" in note for note in run.log.notes)
    first, last = _all(stored_by(run))
    assert last.statistics_distance == {}
    told = run.log.details["statistics_distance"]
    assert told == pytest.approx(first.statistics_distance)


def test_one_image_can_be_dreamed_alone(run):
    run.synthesizer = synthesizer(images=1)
    assert len(run.dream()) == 1
    assert any("dreamed one by one" in note for note in run.log.notes)
    assert "synthesis.statistics_distance" not in run.metrics


# --- judge ------------------------------------------------------------------------------------


def test_judge_measures_what_is_stored_by_hand(toys):
    model = toys.two_bn()
    teacher = toys.teacher(model)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.tensor([0, 1, 2, 0, 1])
    content, quality = as_stored(Dream(images, labels, 1.0), teacher)

    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    std = torch.tensor([0.25, 0.5, 0.125]).view(1, 3, 1, 1)
    stored = ((images * std + mean).clamp(0, 1) * 255).round()
    assert content.images.dtype == torch.uint8
    assert torch.equal(content.images, stored.to(torch.uint8))
    assert torch.equal(content.labels, labels)

    model = model.double()
    z1 = model.conv1((stored.double() / 255 - mean.double()) / std.double())
    z2 = model.conv2(model.bn1(z1).relu())
    r_feature = 0.0
    for z, name, bn in ((z1, "bn1", model.bn1), (z2, "bn2", model.bn2)):
        rows = z.transpose(0, 1).reshape(z.shape[1], -1)
        mean, var = rows.mean(1), rows.var(1, correction=0)
        r_feature += (mean - bn.running_mean).norm() + (var - bn.running_var).norm()
        off = (mean - bn.running_mean) ** 2 + (var.sqrt() - bn.running_var.sqrt()) ** 2
        means, squares = z.mean((2, 3)), (z - mean.view(1, -1, 1, 1)).square().mean((2, 3))
        wider = bn.running_var.maximum(var)
        chance = means.var(0) / wider + squares.var(0) / (4 * wider**2)
        expected = ((off / bn.running_var).mean() / (chance.mean() / 5)).sqrt()
        assert quality.statistics_distance[name] == pytest.approx(expected.item(), rel=1e-4)
    assert quality.r_feature == pytest.approx(r_feature.item(), rel=1e-5)
    logits = model.fc(model.bn2(z2).relu().mean((2, 3)))
    torch.testing.assert_close(content.teacher_logits.double(), logits, rtol=1e-4, atol=1e-5)


def test_judge_leaves_the_teacher_as_it_was(toys):
    model = toys.two_bn().train()
    before = toys.state(model)
    as_stored(Dream(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), 0.0), toys.teacher(model))
    toys.assert_same_state(model, before)


def test_judging_a_batch_leaves_nothing_in_the_next(toys):
    # The scale falls on the first layer seen, so a stale one would change every pixel.
    regularizers = (Term("bn_feature", 1.0, BNFeature("paper", first_layer_scale=10.0)),)
    options = DeepInversion(regularizers, 6, stages=(Stage(3),), batch_size=3)
    teacher, device = toys.teacher(toys.two_bn()), torch.device("cpu")
    first, second = batch_plans(6, 3, 0)
    with options.session(teacher, device) as dreamer:
        as_stored(dreamer.dream(first, lambda *_: None), teacher)
        after = dreamer.dream(second, lambda *_: None)
    with options.session(teacher, device) as dreamer:
        alone = dreamer.dream(second, lambda *_: None)
    assert torch.equal(after.images, alone.images)


def test_judge_without_batch_norm_has_no_distance(toys):
    dreamed = Dream(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), 0.0)
    content, quality = as_stored(dreamed, toys.teacher(toys.plain()))
    assert quality == BatchQuality({}, None)
    assert content.teacher_logits.shape == (2, 3)


class SparinglyNormalised(torch.nn.Module):
    """Has a BatchNorm layer that it does not use, and another only if asked."""

    def __init__(self, use_one):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.used, self.unused = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 3)
        self.use_one = use_one

    def forward(self, x):
        x = self.conv(x)
        return self.fc((self.used(x) if self.use_one else x).relu().mean((2, 3)))


def test_layers_that_are_not_used_are_neither_matched_nor_judged(toys):
    teacher = toys.teacher(SparinglyNormalised(use_one=True).eval())
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, quality = as_stored(Dream(images, torch.zeros(3).long(), 0.0), teacher)
    assert set(quality.statistics_distance) == {"used"}
    synthesizer().inner.check(teacher)


def test_a_network_that_uses_no_batch_norm_layer_has_nothing_to_match(toys):
    teacher = toys.teacher(SparinglyNormalised(use_one=False).eval())
    with pytest.raises(TeacherMismatch, match="uses none of its 2 BatchNorm layers"):
        synthesizer().inner.check(teacher)
    DeepInversion(images=2, regularizers=(), stages=(Stage(1),)).check(teacher)


# --- the store fills --------------------------------------------------------------------------


def test_a_run_fills_the_store_and_reports(run):
    content = run.dream()
    store = stored_by(run)
    assert run.synthesizer.dreamed == [0, 1, 2]
    assert len(store) == len(content) == 7
    metrics = run.metrics
    assert metrics["synthesis.images"] == 7
    assert metrics["synthesis.seconds"] == pytest.approx(sum(s.seconds for s in _all(store)))
    rate = 7 / metrics["synthesis.seconds"]
    assert metrics["synthesis.images_per_second"] == pytest.approx(rate)
    # Averaged over images; the last batch, of one image, has no distance.
    parts = [s.statistics_distance for s in _all(store)]
    by_layer = {name: (parts[0][name] + parts[1][name]) / 2 for name in ("bn1", "bn2")}
    assert parts[2] == {}
    assert run.log.details["statistics_distance"] == pytest.approx(by_layer)
    mean = (by_layer["bn1"] + by_layer["bn2"]) / 2
    assert metrics["synthesis.statistics_distance"] == pytest.approx(mean)
    first, second, _ = content.labels.split(3)
    assert sorted(first.tolist()) == sorted(second.tolist()) == [0, 1, 2], "each before any twice"
    right = (content.teacher_logits.argmax(1) == content.labels).float().mean().item()
    assert metrics["synthesis.teacher_accuracy"] == pytest.approx(right)


def stored_by(run):
    return DreamStore(run.folder / "dreams")


def _all(store):
    return [store.shards[index] for index in sorted(store.shards)]


def test_records_of_a_run(run):
    run.dream()
    records = run.log.records
    # Three batches of two steps, numbered on through the run.
    assert list(records["synthesis"]) == [1, 2, 3, 4, 5, 6]
    assert set(records["synthesis"][1]) == {"loss", "cross_entropy", "bn_feature"}
    assert list(records["batches"]) == [0, 1], "the third is of one image"
    layers = records["statistics distance by layer"][0]
    assert set(layers) == {"bn1", "bn2"}
    mean = sum(layers.values()) / 2
    assert records["batches"][0]["statistics_distance"] == pytest.approx(mean)


def test_a_finished_batch_is_never_dreamed_again(run):
    run.dream()
    before = shards(run)
    run.dream()
    assert run.synthesizer.dreamed == [0, 1, 2], "the second run dreamed nothing"
    assert shards(run) == before


def test_an_interrupted_run_keeps_its_finished_batches(run):
    run.synthesizer.stop_before = 2
    with pytest.raises(KeyboardInterrupt):
        run.dream()
    kept = shards(run)
    assert len(kept) == 2
    run.synthesizer.stop_before = None
    run.synthesizer.dreamed.clear()
    assert len(run.dream()) == 7
    assert run.synthesizer.dreamed == [2]
    assert kept.items() <= shards(run).items()


def test_a_batch_that_overflows_is_left_out_and_reported(run):
    run.synthesizer.overflow = (1,)
    content = run.dream()
    assert run.synthesizer.dreamed == [0, 2]
    assert sorted(content.labels[:3].tolist()) == [0, 1, 2]
    assert len(content) == 4
    assert run.metrics["synthesis.images"] == 4
    assert run.metrics["synthesis.skipped_batches"] == 1
    assert any("batch 1 is left out" in note for note in run.log.notes)
    store = stored_by(run)
    assert sorted(store.shards) == [0, 2]
    assert list(store.skipped) == [1]


def test_a_batch_that_was_left_out_is_not_tried_again(run):
    run.synthesizer.overflow = (1,)
    run.dream()
    run.synthesizer.overflow = ()
    run.synthesizer.dreamed.clear()
    run.log.notes.clear()
    assert len(run.dream()) == 4
    assert run.synthesizer.dreamed == []
    assert run.metrics["synthesis.skipped_batches"] == 1
    (note,) = run.log.notes
    assert note.endswith("skipped-000001.safetensors")


def test_a_run_of_which_every_batch_overflows_is_an_error(run):
    run.synthesizer.overflow = (0, 1, 2)
    with pytest.raises(DreamkitError, match="the first: the loss of batch 0 is not finite"):
        run.dream()
    assert not (run.folder / "dreams").exists()


# --- what it costs, and what was resolved --------------------------------------------------------


def test_the_cost_is_told_before_and_reported(run):
    run.dream()
    (told,) = [note for note in run.log.notes if note.startswith("dreaming")]
    assert re.fullmatch(r"dreaming 7 images in 3 batches: about \d+ s, \d\.\d GB on this CPU", told)
    assert 0 < run.metrics["synthesis.estimated_seconds"] < 60
    assert run.metrics["synthesis.estimated_memory_bytes"] > 2**20
    assert run.metrics["synthesis.preparation_seconds"] > 0


class Recorder:
    """A synthesizer that is its own dreamer, and notes what it is asked for."""

    images, batch_size, steps_per_batch = 5, 2, 1
    choices = MappingProxyType({})

    def __init__(self, carried=MappingProxyType({})):
        self.carried, self.asked, self.plans = carried, [], []

    @property
    def members(self):
        return (self,)

    @contextmanager
    def session(self, teacher, device, choices, note, student, seed):
        yield self

    def state(self):
        return dict(self.carried)

    def prepare(self, images):
        self.asked.append(images)
        return Estimate(1.0, 2**30)

    def dream(self, plan, on_step):
        self.plans.append(plan)
        return Dream(torch.zeros(plan.size, 3, 8, 8), torch.zeros(plan.size).long(), 0.5)


@pytest.mark.parametrize(
    ("carried", "student", "images"),
    [
        ({}, None, 4),  # two of three batches fall to one of two ranks
        ({"w": torch.zeros(1)}, None, 5),  # each builds on the one before
        ({}, torch.nn.Identity(), 5),  # how many come at once is the student's training's to say
    ],
)
def test_ranks_share_what_is_to_be_dreamed(run, monkeypatch, carried, student, images):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    run.synthesizer = Recorder(carried)
    run.estimate(student)
    assert run.synthesizer.asked == [images]
    (told,) = run.log.notes
    assert ("3 batches on 2 ranks: about 1 s" in told) == (images == 4)


def test_a_batch_that_no_rank_made_is_not_passed_over(run, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(distributed, "anywhere", lambda here: here)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "drawn_from", lambda plans, name: iter(plans[::2]))
    monkeypatch.setattr(run_store, "FOUND_SECONDS", 0.0)
    with pytest.raises(DreamkitError, match=r"batch 1 is not in .*dreams, though every rank"):
        run.dream()
    assert sorted(DreamStore(run.folder / "dreams").shards) == [0, 2]


def test_the_same_dreaming_of_another_number_of_images():
    recorder = Recorder()  # not a dataclass, as a plugin's synthesizer need not be
    other = Synthesis(recorder, {"name": "recorder"}).of(9)
    assert (other.synthesizer.images, recorder.images) == (9, 5)
    assert other.synthesizer.asked is recorder.asked


def test_an_estimate_dreams_nothing(run):
    assert run.estimate().seconds > 0
    assert run.synthesizer.dreamed == []
    assert list(run.folder.iterdir()) == []
    run.dream()
    assert run.estimate() is None, "nothing is left to dream"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (99, "99 s"),
        (100, "2 min"),
        (11_400, "3 h 10 min"),
        (47.9 * 3600, "47 h 54 min"),
        (52 * 3600, "2 d 4 h"),
    ],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_what_the_machine_settled_is_kept_and_holds_for_the_rest(run, monkeypatch):
    run.synthesizer = Counting(dataclasses.replace(run.synthesizer.inner, batch_size="auto"))
    monkeypatch.setattr(dreamer, "largest_batch", lambda trial, limit, device: 3)
    run.synthesizer.stop_before = 2
    with pytest.raises(KeyboardInterrupt):
        run.dream()
    resolved = stored_by(run).choices
    assert resolved["batch_size"] == 3
    assert resolved["compile"] is False
    assert resolved["precision"] in {"float32", "bfloat16"}
    # The rest of the run has more memory and a processor that knows less, and does not care.
    monkeypatch.setattr(dreamer, "largest_batch", lambda trial, limit, device: 5)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    run.synthesizer.stop_before = None
    assert len(run.dream()) == 7
    assert run.synthesizer.dreamed == [0, 1, 2]
    assert stored_by(run).choices == resolved


def test_what_was_settled_and_cannot_be_had_any_more_is_said(run, monkeypatch):
    def compiles(function, **settings):
        return function

    def fails(function, **settings):
        raise RuntimeError("no compiler")

    compiled = Engine(precision="float32", compile=True)
    run.synthesizer = Counting(
        dataclasses.replace(run.synthesizer.inner, engine=compiled), stop_before=2
    )
    monkeypatch.setattr(torch, "compile", compiles)
    with pytest.raises(KeyboardInterrupt):
        run.dream()
    resolved = stored_by(run).choices
    assert resolved["compile"] is True
    monkeypatch.setattr(torch, "compile", fails)
    run.synthesizer.stop_before = None
    run.dream()
    assert stored_by(run).choices == resolved, "it still says how the first were made"
    assert any("an undisturbed run's would differ" in note for note in run.log.notes)


@pytest.mark.parametrize("change", ["seed", "teacher", "synthesis"])
def test_a_store_of_another_run_is_refused(run, toys, change):
    run.dream()
    if change == "seed":
        run.context = dataclasses.replace(run.context, seed=4)
    elif change == "teacher":
        run.teacher.card = toys.card(weights_sha256="other")
    else:
        run.settings = {"name": "deepinversion", "images": 8}
    with pytest.raises(StoreError, match=change):
        run.dream()


# --- sources of training images ---------------------------------------------------------------


def test_own_dreams_or_those_of_another_run(run, tmp_path):
    assert is_own_dreams(None)
    assert is_own_dreams(Dreams())
    own = images_of(run.teacher, run.synthesis, run.context)
    other = Dreams(path=str(tmp_path))
    assert not is_own_dreams(other)
    run.synthesizer.dreamed.clear()
    theirs = images_of(run.teacher, other.open(run.teacher.card), run.context)
    assert run.synthesizer.dreamed == []
    assert torch.equal(own.batch(range(7))[0], theirs.batch(range(7))[0])


@pytest.mark.parametrize(("count", "message"), [(0, "empty"), (None, "needs a synthesizer")])
def test_no_images_are_refused(run, toys, count, message):
    images = None if count is None else toys.images(count)
    with pytest.raises(DreamkitError, match=message):
        images_of(run.teacher, images, run.context)


def test_plans_reach_the_dreamer(run):
    run.synthesizer = Recorder()
    run.dream()
    store = stored_by(run)
    plans = run.synthesizer.plans
    assert plans == [BatchPlan(i, 2 * i, s, batch_seed(3, i)) for i, s in enumerate((2, 2, 1))]
    assert [shard.loss for shard in _all(store)] == [0.5, 0.5, 0.5]
