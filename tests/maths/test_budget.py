"""Budgets of a pruning run on a target whose every latency is known, and the runs they steer."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dreamkit.applications.prune import Prune
from dreamkit.criteria.bn_scale import BNScale
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.criteria.random import Random
from dreamkit.errors import DreamkitError, NothingToPrune, OptionError, StoreError
from dreamkit.latency.table import LookUpTable
from dreamkit.pruning import knapsack
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.knapsack import Knapsack
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import Greedy, LayerLimits, Limits, removable
from dreamkit.registry import Term
from dreamkit.report.run_log import MemoryLog
from dreamkit.seeds import derived_seed
from dreamkit.stages import measuring, pauses, samples
from dreamkit.stages.budget import Budget, Target
from dreamkit.stages.measuring import measure_costs
from dreamkit.stages.pauses import Pauses
from dreamkit.stages.pruning_run import PruningRun
from dreamkit.stages.reconstructing import Reconstruction
from dreamkit.stages.samples import parted
from dreamkit.stages.teaching import Recovery
from dreamkit.training.losses.distillation import LogitDistance
from dreamkit.types import LatencyBackend, Timing

SIZE = (3, 8, 8)
SELECTIONS = {"greedy": Greedy(), "knapsack": Knapsack()}


class Weights(LatencyBackend):
    """A target on which a model takes a microsecond a weight of its layers, and ``extra`` more.

    ``factor`` is how much longer whole models take than their layers say.
    """

    batch_size = 1
    folds_norms = True

    def __init__(self, extra=0.0, factor=1.0):
        self.extra, self.factor = extra, factor
        self.timed = 0

    def describe(self):
        return {"device": "weights"}

    def time(self, modules):
        timings = []
        for module, x in modules:
            with torch.no_grad():
                module(x)
            whole = not isinstance(module, nn.Conv2d | nn.Linear)
            self.timed += whole
            layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            ms = 1e-3 * sum(m.weight.numel() for m in layers)
            timings.append(Timing(ms * self.factor + self.extra if whole else ms, 0.0))
        return timings


class Acting(MemoryLog):
    """A log that does something when a stage begins, or before it keeps one of its records."""

    def __init__(self, act, stage, step=None):
        super().__init__()
        self.act, self.stage, self.step = act, stage, step

    def progress(self, stage, total, before=0):
        if (stage, None) == (self.stage, self.step):
            self.act()
        return super().progress(stage, total, before)

    def record(self, stage, step, numbers):
        if (stage, step) == (self.stage, self.step):
            self.act()
        super().record(stage, step, numbers)


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn())


@pytest.fixture
def residual(toys):
    return toys.teacher(toys.residual())


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


def weights_of(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def parameters_of(model):
    """Return how many parameters layers have that a look-up table knows."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


# --- budgets ----------------------------------------------------------------------------------


def test_a_latency_goal_in_milliseconds_is_a_share_of_the_teachers(residual):
    backend = Weights()
    whole = 1e-3 * weights_of(residual.model)
    budget = Budget(Target(latency_ms=0.25 * whole), residual, LookUpTable(backend), 9, backend)
    assert budget.goals == {"latency": pytest.approx(0.25)}
    assert budget.latency_ms(whole) == 0.25 * whole
    assert budget.shares(residual.model, 9)["latency"] == pytest.approx(1)


def test_of_two_latency_goals_the_lower_counts(residual):
    backend = Weights()
    whole = 1e-3 * weights_of(residual.model)
    for share in (0.2, 0.6):
        target = Target(latency=share, latency_ms=0.4 * whole)
        budget = Budget(target, residual, LookUpTable(backend), 9, backend)
        assert budget.goals["latency"] == pytest.approx(min(share, 0.4))
        assert budget.latency_ms(whole) == pytest.approx(min(share, 0.4) * whole)


def test_a_budget_that_the_teacher_meets_already(residual):
    backend = Weights()
    with pytest.raises(NothingToPrune, match="meets the budget of 99 ms already"):
        Budget(Target(latency_ms=99), residual, LookUpTable(backend), 9, backend)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_goal_that_is_met_is_held_while_the_others_are_sought(toys, teacher, tmp_path, selection):
    run = toys.context(tmp_path, latency=Weights())
    whole = 1e-3 * weights_of(teacher.model)
    target = Target(flops=0.6, latency_ms=1.25 * whole)
    pruning(target=target, recovery=UNTRAINED, selection=SELECTIONS[selection]).run(
        teacher, toys.images(24), run
    )
    assert run.log.metrics["pruned.flops_ratio"] <= 0.6
    assert run.log.metrics["pruned.latency_ratio"] <= 1.25
    assert [note for note in run.log.notes if "meets the budget" in note] == [
        f"the teacher takes {whole:.3f} ms here, which meets the budget of {1.25 * whole} ms "
        "already: it is kept while the other goals are sought"
    ]


def test_of_two_latency_goals_one_may_be_met_already(residual):
    backend = Weights()
    target = Target(latency=0.5, latency_ms=99)
    notes = []
    budget = Budget(target, residual, LookUpTable(backend), 9, backend, note=notes.append)
    assert budget.goals == {"latency": 0.5}
    assert len(notes) == 1


def test_predictions_are_corrected_by_measurements(residual):
    # Half of what a whole model takes is in no layer: predictions are too low for small models.
    backend = Weights(extra=1e-3 * weights_of(residual.model))
    budget = Budget(Target(latency=0.7), residual, LookUpTable(backend), 9, backend)
    small = copy.deepcopy(residual.model)
    graph = ChannelGraph(small, SIZE)
    graph.remove({group.name: [0, 1] for group in graph.groups()[0]})
    predicted = budget.shares(small, 5)
    left = weights_of(small) / weights_of(residual.model)
    assert predicted["latency"] == pytest.approx(left)
    measured = budget.verified(small, predicted)
    assert measured["latency"] == pytest.approx((left + 1) / 2)
    assert budget.shares(small, 5)["latency"] == pytest.approx((left + 1) / 2)


def test_watching_ends_at_the_chunk_that_reaches_the_goal(residual):
    backend = Weights()
    model = residual.model
    budget = Budget(Target(params=0.6), residual, LookUpTable(backend), 9, backend)
    groups = ChannelGraph(model, SIZE).groups()[0]
    scores = [torch.arange(group.channels).float() for group in groups]
    originals = {group.name: group.channels for group in groups}
    chunks = removable(groups, scores, originals, Limits(min_channels=1))
    enough = budget.forecast(model, groups, {"params": 1.0}).enough
    removed: dict[str, list[int]] = {}
    reached = []
    for chunk in (chunk for group in chunks for chunk in group):
        reached.append(enough(chunk))
        removed.setdefault(chunk.group.name, []).extend(chunk.channels)
        small = copy.deepcopy(model)
        ChannelGraph(small, SIZE).remove(removed)
        assert reached[-1] == (parameters_of(small) <= 0.6 * parameters_of(model))
    assert reached[0] is False
    assert reached[-1] is True


def test_what_a_round_has_to_save(residual):
    backend = Weights()
    budget = Budget(Target(params=0.5, channels=0.9), residual, LookUpTable(backend), 10, backend)
    shares = {"params": 0.8, "channels": 0.95, "flops": 0.7}
    needs = budget.needs(residual.model, shares, most=0.1, chunks=[])
    assert [need for _, need in needs] == pytest.approx(
        [0.1 / 0.8 * parameters_of(residual.model), 0.5]
    )
    assert budget.needs(residual.model, {"params": 0.5, "channels": 0.9}, 0.1, []) == []


def test_what_chunks_save_of_the_latency_is_measured_together(residual):
    backend = Weights()
    table = LookUpTable(backend)
    budget = Budget(Target(latency=0.5), residual, table, 10, backend)
    groups = ChannelGraph(residual.model, SIZE).groups()[0]
    scores = [torch.arange(group.channels).float() for group in groups]
    originals = {group.name: group.channels for group in groups}
    chunks = removable(groups, scores, originals, Limits(min_channels=1))
    ((saved, _),) = budget.needs(residual.model, {"latency": 1.0}, 0.1, chunks)
    known = dict(table.points)
    for group in chunks:
        for gone in range(1, len(group) + 1):
            assert saved(group[0].group, gone) > 0
    assert table.points == known


# --- whole runs -------------------------------------------------------------------------------


def pruning(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(params=0.7),
        "recovery": Recovery(epochs=1, batch_size=8, precision="float32"),
        "limits": Limits(min_channels=1),
        "step": 0.2,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


UNTRAINED = Recovery(epochs=0, batch_size=8)
FIT = Reconstruction(images=24, batch_size=8)


@pytest.mark.parametrize("selection", ["greedy", "knapsack"])
@pytest.mark.parametrize("goal", ["params", "flops", "channels", "latency"])
def test_goals_are_met_and_hardly_overshot(toys, teacher, tmp_path, selection, goal):
    timed = goal == "latency"
    run = toys.context(tmp_path, latency=Weights() if timed else None)
    options = pruning(target=Target(**{goal: 0.6}), selection=SELECTIONS[selection])
    outcome = options.run(teacher, toys.images(24), run)
    metrics = run.log.metrics
    reached = metrics[f"pruned.{goal}_ratio"]
    assert reached <= 0.6
    assert reached > 0.3, "one channel of this toy is up to a fifth of it"
    assert run.log.failures == []
    measure_costs(outcome, teacher, run, latency=timed)
    assert metrics["pruned.params"] == metrics["student.params"] < metrics["teacher.params"]
    rounds = list(run.log.records["pruning"].values())
    assert len(rounds) == metrics["pruned.rounds"]
    assert {"removed_channels", "flops", "params", "channels"} <= rounds[-1].keys()
    assert ("latency_ms" in rounds[-1]) == timed


def test_what_pruning_left_is_fitted_to_the_teacher(toys, teacher, tmp_path):
    """Without a step of training, the reconstructed network is nearer to its teacher."""
    errors = []
    x = torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(1))
    for number, reconstruction in enumerate((None, FIT)):
        options = pruning(recovery=UNTRAINED, reconstruction=reconstruction)
        run = toys.context(tmp_path / f"run{number}")
        student = rebuilt(toys, options.run(teacher, toys.images(24), run).student)
        with torch.no_grad():
            errors.append(float((student(x) - teacher.model(x)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def rebuilt(toys, student):
    """Return a fresh network that is cut as a student's pruning_record says, with its weights."""
    model = toys.two_bn()
    PruningRecord.from_json(student.pruning_record).rebuild(model)
    model.load_state_dict(student.model.state_dict())
    return model.eval()


def test_finetuning_between_rounds_comes_after_the_fit_and_stays(toys, teacher, context):
    tuned = Recovery(steps=2, batch_size=8, precision="float32", lr=0.1)
    options = pruning(recovery=UNTRAINED, reconstruction=FIT, reconstruct_each=True, finetune=tuned)
    student = options.run(teacher, toys.images(24), context).student
    whole = teacher.model.state_dict()
    places = student.pruning_record["kept"].get("bn1.weight", [None])[0]
    scales = whole["bn1.weight"] if places is None else whole["bn1.weight"][places]
    left = student.model.state_dict()["bn1.weight"]
    assert not torch.equal(left, scales), "as finetuning left them"
    assert "cut.agreement" not in context.log.metrics


def test_no_dream_that_models_are_compared_on_is_seen_by_anything_else(
    toys, teacher, tmp_path, monkeypatch
):
    """Ranking, statistics, a fit, pauses, and the recovery: each reads its images by number."""
    monkeypatch.setattr(samples, "LEAST", 4)
    read = {}

    class Watched:
        def __init__(self):
            self.images = toys.images(48)
            self.stage = []

        def __len__(self):
            return len(self.images)

        def batch(self, indices):
            stage = "compared" if "agreement" in str(log.stages.innermost) else "fitted"
            read.setdefault(stage, set()).update(indices)
            return self.images.batch(indices)

    log = MemoryLog()
    run = toys.context(tmp_path, log=log)
    tuned = Recovery(steps=6, batch_size=16, precision="float32", freeze_bn=False)
    options = pruning(
        recovery=dataclasses.replace(tuned, statistics="recalibrate", statistics_batches=2),
        reconstruction=FIT,
        reconstruct_each=True,
        finetune=tuned,
    )
    options.run(teacher, Watched(), run)
    assert len(read["compared"]) == 4
    assert len(read["fitted"]) > 30
    assert not read["fitted"] & read["compared"]
    measured_on = {"images": 4, "held_out": True}
    assert log.details["agreement"] == {"pruned": measured_on, "student": measured_on}
    looks = log.records["pruning"].values()
    assert all("agreement" in look for look in looks), "there are no evaluation images"


def test_a_round_is_looked_at_on_a_draw_of_the_evaluation_images(
    toys, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(measuring, "GLANCED", 5)
    looked_at = []

    class Told(MemoryLog):
        def progress(self, stage, total, before=0):
            looked_at.append((stage, total))
            return super().progress(stage, total, before)

    run = toys.context(tmp_path, log=Told(), evaluation=toys.images(9))
    pruning(recovery=UNTRAINED).run(teacher, toys.images(24), run)
    assert ("accuracy", 5) in looked_at
    assert {("teacher accuracy", 9), ("pruned accuracy", 9), ("student accuracy", 9)} <= {
        *looked_at
    }


def test_a_fit_in_each_round_leaves_none_for_the_end(toys, teacher, tmp_path):
    fitted = []
    log = Acting(lambda: fitted.append(1), "reconstruction")
    run = toys.context(tmp_path, log=log)
    options = pruning(recovery=UNTRAINED, reconstruction=FIT, reconstruct_each=True, step=0.1)
    options.run(teacher, toys.images(24), run)
    assert len(fitted) == log.metrics["pruned.rounds"] > 1
    assert "cut.agreement" not in log.metrics
    assert log.metrics["student.agreement"] > 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reconstruct_each": True}, "set 'reconstruction' too"),
        ({"finetune_drop": 0.1}, "set 'finetune' too"),
        (
            {"finetune": Recovery(), "reconstruction": Reconstruction()},
            "set it to true: a fit at the end alone would undo all that 'finetune' taught",
        ),
    ],
)
def test_fits_that_would_do_nothing_or_harm_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        pruning(**given)


def test_statistics_are_taken_anew_where_a_layer_that_lost_something_cannot_be_fitted(
    toys, teacher, context
):
    teacher.model.conv2.padding_mode = "circular"
    options = pruning(recovery=UNTRAINED, reconstruction=FIT)
    student = options.run(teacher, toys.images(24), context).student
    assert context.log.details["reconstruction_left_alone"] == ["conv2"]
    places = student.pruning_record["kept"].get("bn2.running_mean", [None])[0]
    before = teacher.model.state_dict()["bn2.running_mean"]
    assert not torch.equal(
        student.model.state_dict()["bn2.running_mean"],
        before if places is None else before[places],
    )


def test_what_cannot_be_scored_is_refused_before_any_image_is_wanted(toys, context):
    scales = (Term("magnitude", 1.0, Magnitude()), Term("bn_scale", 1.0, BNScale()))
    with pytest.raises(NothingToPrune, match="in the channel groups pointwise") as refused:
        pruning(criteria=scales).run(toys.teacher(toys.depthwise()), None, context)
    assert refused.value.path == ("criteria", 1)


def test_groups_that_limits_leave_alone_need_not_be_scored(toys, context):
    limits = Limits(min_channels=1, exceptions=(LayerLimits("pointwise", max_ratio=0),))
    scales = (Term("bn_scale", 1.0, BNScale()),)
    options = pruning(criteria=scales, limits=limits, target=Target(channels=0.8))
    outcome = options.run(toys.teacher(toys.depthwise()), toys.images(24), context)
    assert context.log.metrics["pruned.channels_ratio"] <= 0.8
    student = outcome.student.model.state_dict()
    assert student["pointwise.weight"].shape[0] == 6
    assert student["conv1.weight"].shape[0] < 4


class Spread(nn.Module):
    """A grey image in four parts, by a parameter: no layer makes them, and they stay."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Parameter(torch.linspace(0.1, 0.4, 4).view(1, 4, 1, 1))
        self.conv = nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.conv(x.mean(1, keepdim=True) * self.parts).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["parts", "fc"])
def test_limits_may_name_what_is_left_alone_anyhow(toys, context, name):
    limits = Limits(min_channels=1, exceptions=(LayerLimits(name, max_ratio=0),))
    PruningRun(pruning(limits=limits), toys.teacher(toys.fill(Spread())), context)
    assert name in [skipped["group"] for skipped in context.log.details["pruning_skipped"]]


def test_a_knapsack_without_an_answer_is_not_a_target_out_of_reach(
    toys, residual, context, monkeypatch
):
    monkeypatch.setattr(
        knapsack, "milp", lambda **problem: SimpleNamespace(status=1, x=None, message="late")
    )
    with pytest.raises(DreamkitError, match="not solved in 60 s") as refused:
        pruning(selection=Knapsack()).run(residual, toys.images(24), context)
    assert refused.value.path == ("selection",)


def test_pruning_goes_on_until_the_measured_latency_is_met(toys, teacher, tmp_path):
    # What is in no layer takes as long as all layers do: the table alone would stop too early.
    whole = 1e-3 * weights_of(teacher.model)
    run = toys.context(tmp_path, latency=Weights(extra=whole))
    pruning(target=Target(latency=0.7)).run(teacher, toys.images(24), run)
    metrics = run.log.metrics
    assert metrics["student.latency_ms"] <= 0.7 * metrics["teacher.latency_ms"]
    assert metrics["student.latency_budget_ms"] == pytest.approx(1.4 * whole)
    assert run.log.failures == []


def test_a_latency_budget_that_is_missed_in_the_end_is_a_failure(toys, teacher, tmp_path):
    backend = Weights()

    def become_busy():
        backend.factor = 1.2

    run = toys.context(tmp_path, latency=backend, log=Acting(become_busy, "recovery"))
    whole = 1e-3 * weights_of(teacher.model)
    options = pruning(target=Target(latency_ms=0.6 * whole))
    options.run(teacher, toys.images(24), run)
    student = run.log.metrics["student.latency_ms"]
    if student > 1.05 * 0.6 * whole:
        (failure,) = run.log.failures
        assert f"takes {student:.3f} ms and was to take {0.6 * whole:.3f} ms" in failure
    else:
        pytest.fail("the toy is too coarse for this test")


def test_finetuning_between_rounds_changes_what_goes_on_being_pruned(toys, teacher, tmp_path):
    between = Recovery(steps=2, batch_size=8, precision="float32")
    steps = {}
    for name, finetune in (("plain", None), ("tuned", between)):
        run = toys.context(tmp_path / name)
        pruning(finetune=finetune).run(teacher, toys.images(24), run)
        steps[name] = run.log.metrics["training.steps"]
    assert steps["tuned"] > steps["plain"]


def test_every_pause_draws_other_images(toys, teacher, tmp_path, monkeypatch):
    seeds = []

    def teach(teacher, student, images, options, context, stage, resumable, kept):
        seeds.append((stage, context.seed, resumable))

    monkeypatch.setattr(pauses, "train_student", teach)
    between = Recovery(steps=2, batch_size=8, precision="float32")
    options = pruning(finetune=between, step=0.1)
    options.run(teacher, toys.images(24), toys.context(tmp_path, seed=7))
    assert len(seeds) > 1
    stages = [f"finetune {n}" for n in range(1, len(seeds) + 1)]
    assert seeds == [(stage, derived_seed(7, stage), False) for stage in stages]


@pytest.mark.parametrize(
    ("drop", "trained"),
    [
        (0.0, [1, 2, 3, 4]),
        (0.3, [2, 4]),  # of 1: 0.8, 0.65; of 0.9: 0.65, 0.5
        (0.8, []),
    ],
)
def test_a_pause_comes_where_agreement_has_fallen(
    toys, teacher, context, monkeypatch, drop, trained
):
    """Each round loses some of it, and a training brings it back to 0.9."""
    said = []
    state = {"agreement": 1.0}

    def teach(teacher, student, images, options, context, stage, resumable, kept):
        said.append(int(stage.split()[1]))
        state["agreement"] = 0.9

    monkeypatch.setattr(pauses, "train_student", teach)
    monkeypatch.setattr(Pauses, "_agreement", lambda self, student: state["agreement"])
    tuned = Recovery(steps=2, batch_size=8)
    parts = parted(toys.images(24), 0, context.log.note)
    work = Pauses(pruning(finetune=tuned, finetune_drop=drop), teacher, parts, context)
    looked = []
    for number, loss in enumerate((0.2, 0.15, 0.25, 0.15), 1):
        state["agreement"] -= loss
        work.after_round(number, teacher.model, {})
        looked.append(work.looked["trained"])
    assert said == trained
    assert looked == [float(number in trained) for number in range(1, 5)]


def test_agreement_is_looked_at_on_images_that_nothing_is_fitted_on(
    toys, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(samples, "LEAST", 5)
    seen = set()

    class Watched:
        def __init__(self):
            self.images = toys.images(50)

        def __len__(self):
            return len(self.images)

        def batch(self, indices):
            if log.stages.innermost == "agreement":
                seen.update(indices)
            return self.images.batch(indices)

    log = MemoryLog()
    run = toys.context(tmp_path, log=log, evaluation=toys.images(9))
    tuned = Recovery(steps=2, batch_size=8, precision="float32")
    options = pruning(finetune=tuned, finetune_drop=0.9, recovery=UNTRAINED)
    options.run(teacher, Watched(), run)
    assert seen == set(samples.held_back(50, run.seed).tolist())
    assert all(record["trained"] == 0 for record in log.records["pruning"].values())
    assert log.metrics["training.steps"] == 0


def test_a_record_tells_the_agreement_that_decided(toys, teacher, context, monkeypatch):
    monkeypatch.setattr(Pauses, "_agreement", lambda self, student: 0.375)
    tuned = Recovery(steps=2, batch_size=8, precision="float32")
    pruning(finetune=tuned, finetune_drop=0.9).run(teacher, toys.images(24), context)
    assert all(r["agreement"] == 0.375 for r in context.log.records["pruning"].values())


class Interrupted(BaseException):
    """Stands for a kill."""


def interrupt():
    raise Interrupted


@pytest.mark.parametrize(
    "between",
    [
        {},
        {"reconstruction": FIT, "reconstruct_each": True},
        {
            "finetune": Recovery(
                steps=2, batch_size=8, precision="float32", soft_loss=LogitDistance(), ema=0.9
            )
        },
        {
            "finetune": Recovery(steps=2, batch_size=8, precision="float32", lr=0.1),
            "finetune_drop": 0.2,
        },
    ],
    ids=["plain", "fitted", "trained", "where needed"],
)
@pytest.mark.parametrize(("stage", "step"), [("pruning", 2), ("recovery", None)])
def test_a_pruning_that_is_killed_ends_like_an_undisturbed_one(
    toys, teacher, tmp_path, stage, step, between
):
    options = pruning(**({"criteria": (Term("random", 1.0, Random()),), "step": 0.1} | between))
    images = toys.images(24)
    whole = toys.context(tmp_path / "whole")
    expected = options.run(teacher, images, whole).student

    parts = toys.context(tmp_path / "parts", log=Acting(interrupt, stage, step))
    with pytest.raises(Interrupted):
        options.run(teacher, images, parts)
    again = toys.context(tmp_path / "parts")
    student = options.run(teacher, images, again).student
    assert any("pruning: going on after round" in note for note in again.log.notes)
    assert again.log.metrics["pruned.rounds"] == whole.log.metrics["pruned.rounds"] > 1
    assert again.log.details == whole.log.details
    assert again.log.metrics.keys() == whole.log.metrics.keys()
    assert student.pruning_record == expected.pruning_record
    toys.assert_same_tensors(student.model, expected.model)


def test_a_checkpoint_of_another_pruning_is_refused(toys, teacher, tmp_path):
    run = toys.context(tmp_path, log=Acting(interrupt, "recovery"))
    with pytest.raises(Interrupted):
        pruning().run(teacher, toys.images(24), run)
    with pytest.raises(StoreError, match="delete it to prune from the start"):
        pruning().run(teacher, toys.images(16), toys.context(tmp_path))
    teacher.card = toys.card(weights_sha256="another")
    with pytest.raises(StoreError, match="delete it to prune from the start"):
        pruning().run(teacher, toys.images(24), toys.context(tmp_path))


def test_a_pruned_student_is_pruned_further(toys, teacher, tmp_path):
    first = pruning().run(teacher, toys.images(24), toys.context(tmp_path / "first")).student
    again = toys.context(tmp_path / "again")
    second = pruning().run(first, toys.images(24), again).student
    assert weights_of(rebuilt(toys, second)) < weights_of(first.model)
