"""Budgets of a pruning run on a target whose every latency is known, and the runs they steer."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dreamkit.applications import prune as prune_module
from dreamkit.applications.prune import Prune, Recovery
from dreamkit.criteria.bn_scale import BNScale
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.criteria.random import Random
from dreamkit.errors import DreamkitError, NothingToPrune, OptionError, StoreError
from dreamkit.latency.lut import LookUpTable
from dreamkit.pruning import knapsack
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import LayerLimits, Limits, removable
from dreamkit.registry import Term
from dreamkit.stages import measuring
from dreamkit.stages.budget import Budget, Target
from dreamkit.stages.reconstructing import Reconstruction, reconstruct_student
from dreamkit.store.artifact import read_artifact
from dreamkit.types import RunContext, Timing

SIZE = (3, 8, 8)


class Weights:
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


class Images:
    """The images that a run is given in place of dreams."""

    def __init__(self, stored):
        self.stored = stored
        self.path = "somewhere"

    def open(self, card):
        return self.stored


@pytest.fixture
def context(toys, silent_log, tmp_path):
    def make(backend, model=None, folder=""):
        teacher = toys.teacher(model or toys.residual())
        place = tmp_path / folder
        return RunContext(
            {}, 3, torch.device("cpu"), place, teacher, None, None, backend, silent_log
        )

    return make


def weights_of(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def parameters_of(model):
    """Return how many parameters layers have that a look-up table knows."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


# --- budgets ----------------------------------------------------------------------------------


def test_a_latency_goal_in_milliseconds_is_a_share_of_the_teachers(context):
    backend = Weights()
    run = context(backend)
    whole = 1e-3 * weights_of(run.teacher.model)
    budget = Budget(Target(latency_ms=0.25 * whole), run, LookUpTable(backend), 9)
    assert budget.goals == {"latency": pytest.approx(0.25)}
    assert budget.latency_ms(whole) == 0.25 * whole
    assert budget.shares(run.teacher.model, 9)["latency"] == pytest.approx(1)


def test_of_two_latency_goals_the_lower_counts(context):
    backend = Weights()
    run = context(backend)
    whole = 1e-3 * weights_of(run.teacher.model)
    for share in (0.2, 0.6):
        target = Target(latency=share, latency_ms=0.4 * whole)
        budget = Budget(target, run, LookUpTable(backend), 9)
        assert budget.goals["latency"] == pytest.approx(min(share, 0.4))
        assert budget.latency_ms(whole) == pytest.approx(min(share, 0.4) * whole)


def test_a_budget_that_the_teacher_meets_already(context):
    backend = Weights()
    run = context(backend)
    with pytest.raises(NothingToPrune, match="meets the budget of 99 ms already"):
        Budget(Target(latency_ms=99), run, LookUpTable(backend), 9)


def test_predictions_are_corrected_by_measurements(context, toys):
    # Half of what a whole model takes is in no layer: predictions are too low for small models.
    run = context(Weights())
    whole = 1e-3 * weights_of(run.teacher.model)
    run.latency = Weights(extra=whole)
    budget = Budget(Target(latency=0.7), run, LookUpTable(run.latency), 9)
    small = copy.deepcopy(run.teacher.model)
    graph = ChannelGraph(small, SIZE)
    graph.remove({group.name: [0, 1] for group in graph.groups()[0]})
    predicted = budget.shares(small, 5)
    left = weights_of(small) / weights_of(run.teacher.model)
    assert predicted["latency"] == pytest.approx(left)
    measured = budget.verified(small, predicted)
    assert measured["latency"] == pytest.approx((left + 1) / 2)
    assert budget.shares(small, 5)["latency"] == pytest.approx((left + 1) / 2)


def test_watching_ends_at_the_chunk_that_reaches_the_goal(context):
    run = context(Weights())
    model = run.teacher.model
    budget = Budget(Target(params=0.6), run, LookUpTable(run.latency), 9)
    groups = ChannelGraph(model, SIZE).groups()[0]
    scores = [torch.arange(group.channels).float() for group in groups]
    originals = {group.name: group.channels for group in groups}
    chunks = removable(groups, scores, originals, Limits(min_channels=1))
    enough = budget.watch(model, groups, {"channels": 1.0, "flops": 1.0, "params": 1.0})
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


def test_what_a_round_has_to_save(context):
    run = context(Weights())
    budget = Budget(Target(params=0.5, channels=0.9), run, LookUpTable(run.latency), 10)
    shares = {"params": 0.8, "channels": 0.95, "flops": 0.7}
    needs = budget.needs(run.teacher.model, shares, most=0.1, chunks=[])
    assert [need for _, need in needs] == pytest.approx(
        [0.1 / 0.8 * parameters_of(run.teacher.model), 0.5]
    )
    assert budget.needs(run.teacher.model, {"params": 0.5, "channels": 0.9}, 0.1, []) == []


def test_what_chunks_save_of_the_latency_is_measured_together(context):
    run = context(Weights())
    table = LookUpTable(run.latency)
    budget = Budget(Target(latency=0.5), run, table, 10)
    groups = ChannelGraph(run.teacher.model, SIZE).groups()[0]
    scores = [torch.arange(group.channels).float() for group in groups]
    originals = {group.name: group.channels for group in groups}
    chunks = removable(groups, scores, originals, Limits(min_channels=1))
    ((saved, _),) = budget.needs(run.teacher.model, {"latency": 1.0}, 0.1, chunks)
    known = dict(table.points)
    for group in chunks:
        for gone in range(1, len(group) + 1):
            assert saved(group[0].group, gone) > 0
    assert table.points == known


# --- whole runs -------------------------------------------------------------------------------


def pruning(toys, **changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(params=0.7),
        "recovery": Recovery(epochs=1, batch_size=8, precision="float32"),
        "limits": Limits(min_channels=1),
        "step": 0.2,
        "ranking_batches": 1,
        "batch_size": 8,
        "recalibration_batches": 1,
        "images": Images(toys.images(24)),
    }
    return Prune(**(known | changes))


@pytest.mark.parametrize("selection", ["greedy", "knapsack"])
@pytest.mark.parametrize("goal", ["params", "flops", "channels", "latency"])
def test_goals_are_met_and_hardly_overshot(toys, context, selection, goal):
    run = context(Weights(), toys.two_bn())
    pruning(toys, target=Target(**{goal: 0.6}), selection=selection).run(run)
    reached = run.metrics[f"pruned.{goal}_ratio"]
    assert reached <= 0.6
    assert reached > 0.3, "one channel of this toy is up to a fifth of it"
    assert run.failures == []
    assert run.metrics["student.params"] < run.metrics["teacher.params"]
    rounds = [numbers for stage, _, numbers in run.log.records if stage == "pruning"]
    assert len(rounds) == run.metrics["pruned.rounds"]
    assert {"removed_channels", "flops", "params", "channels", "latency_ms"} <= rounds[-1].keys()


def test_what_pruning_left_is_fitted_to_the_teacher(toys, context):
    """Without a step of training, the reconstructed network is nearer to its teacher."""
    errors = []
    x = torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(1))
    for number, reconstruction in enumerate((None, Reconstruction(images=24, batch_size=8))):
        run = context(Weights(), toys.two_bn(), f"run{number}")
        recovery = Recovery(epochs=0, batch_size=8)
        pruning(toys, recovery=recovery, reconstruction=reconstruction).run(run)
        student = toys.two_bn()
        saved = read_artifact(run.folder / "student")
        PruningRecord.from_json(saved.pruning_record).rebuild(student)
        student.load_state_dict(saved.state)
        with torch.no_grad():
            errors.append(float((student(x) - run.teacher.model(x)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_finetuning_between_rounds_comes_after_the_fit_and_stays(toys, context):
    run = context(Weights(), toys.two_bn())
    tuned = Recovery(steps=2, batch_size=8, precision="float32", lr=0.1)
    options = pruning(
        toys,
        recovery=Recovery(epochs=0, batch_size=8),
        reconstruction=Reconstruction(images=24, batch_size=8),
        reconstruct_each=True,
        finetune=tuned,
    )
    options.run(run)
    kept = read_artifact(run.folder / "student")
    whole = run.teacher.model.state_dict()
    places = kept.pruning_record["kept"].get("bn1.weight", [None])[0]
    scales = whole["bn1.weight"] if places is None else whole["bn1.weight"][places]
    assert not torch.equal(kept.state["bn1.weight"], scales), "as finetuning left them"
    assert "cut.agreement" not in run.metrics


def test_models_are_compared_with_the_teacher_on_some_of_many_dreams(toys, context, monkeypatch):
    monkeypatch.setattr(measuring, "COMPARED", 5)
    seen = []

    def counted(model, teacher, images, card, device):
        seen.append(images.batch(range(len(images)))[0])
        return 0.5

    monkeypatch.setattr(measuring, "agreement", counted)
    run = context(Weights(), toys.two_bn())
    for name in ("pruned", "student"):
        measuring.measure_quality(run, name, toys.two_bn(), toys.images(12))
    assert [len(images) for images in seen] == [5, 5]
    assert torch.equal(*seen), "the same for all"
    assert run.metrics["student.agreement"] == 0.5


def test_a_fit_in_each_round_leaves_none_for_the_end(toys, context, monkeypatch):
    fitted = []

    def counted(*arguments):
        fitted.append(len(fitted))
        reconstruct_student(*arguments)

    monkeypatch.setattr(prune_module, "reconstruct_student", counted)
    run = context(Weights(), toys.two_bn())
    fit = Reconstruction(images=24, batch_size=8)
    untrained = Recovery(epochs=0, batch_size=8)
    pruning(toys, recovery=untrained, reconstruction=fit, reconstruct_each=True, step=0.1).run(run)
    assert len(fitted) == run.metrics["pruned.rounds"] > 1
    assert "cut.agreement" not in run.metrics
    assert run.metrics["student.agreement"] > 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reconstruct_each": True}, "set 'reconstruction' too"),
        (
            {"finetune": Recovery(), "reconstruction": Reconstruction()},
            "set it to true: a fit at the end alone would undo all that 'finetune' taught",
        ),
    ],
)
def test_fits_that_would_do_nothing_or_harm_are_refused(toys, given, message):
    with pytest.raises(OptionError, match=message):
        pruning(toys, **given)


def test_statistics_are_taken_anew_where_a_layer_that_lost_something_cannot_be_fitted(
    toys, context
):
    network = toys.two_bn()
    network.conv2.padding_mode = "circular"
    run = context(Weights(), network)
    fit = Reconstruction(images=24, batch_size=8)
    options = pruning(toys, recovery=Recovery(epochs=0, batch_size=8), reconstruction=fit)
    options.run(run)
    assert run.details["reconstruction_left_alone"] == ["conv2"]
    kept = read_artifact(run.folder / "student")
    places = kept.pruning_record["kept"].get("bn2.running_mean", [None])[0]
    before = network.state_dict()["bn2.running_mean"]
    assert not torch.equal(
        kept.state["bn2.running_mean"], before if places is None else before[places]
    )


def test_what_cannot_be_scored_is_refused_before_any_image_is_wanted(toys, context):
    scales = (Term("magnitude", 1.0, Magnitude()), Term("bn_scale", 1.0, BNScale()))
    options = pruning(toys, criteria=scales, images=Images(None))
    with pytest.raises(NothingToPrune, match="in the channel groups pointwise") as refused:
        options.run(context(Weights(), toys.depthwise()))
    assert refused.value.path == ("criteria", 1)


def test_groups_that_limits_leave_alone_need_not_be_scored(toys, context):
    run = context(Weights(), toys.depthwise())
    limits = Limits(min_channels=1, exceptions=(LayerLimits("pointwise", max_ratio=0),))
    scales = (Term("bn_scale", 1.0, BNScale()),)
    pruning(toys, criteria=scales, limits=limits, target=Target(channels=0.8)).run(run)
    assert run.metrics["pruned.channels_ratio"] <= 0.8
    student = read_artifact(run.folder / "student").state
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
    run = context(Weights(), toys.fill(Spread()))
    limits = Limits(min_channels=1, exceptions=(LayerLimits(name, max_ratio=0),))
    prune_module._Pruning(pruning(toys, limits=limits), run)
    assert name in [skipped["group"] for skipped in run.details["pruning_skipped"]]


def test_a_knapsack_without_an_answer_is_not_a_target_out_of_reach(toys, context, monkeypatch):
    monkeypatch.setattr(
        knapsack, "milp", lambda **problem: SimpleNamespace(status=1, x=None, message="late")
    )
    with pytest.raises(DreamkitError, match="not solved in 60 s") as refused:
        pruning(toys, selection="knapsack").run(context(Weights()))
    assert refused.value.path == ("selection",)


def test_pruning_goes_on_until_the_measured_latency_is_met(toys, context):
    # What is in no layer takes as long as all layers do: the table alone would stop too early.
    run = context(Weights(), toys.two_bn())
    whole = 1e-3 * weights_of(run.teacher.model)
    run.latency = Weights(extra=whole)
    pruning(toys, target=Target(latency=0.7)).run(run)
    assert run.metrics["student.latency_ms"] <= 0.7 * run.metrics["teacher.latency_ms"]
    assert run.metrics["student.latency_budget_ms"] == pytest.approx(1.4 * whole)
    assert run.failures == []


def test_a_latency_budget_that_is_missed_in_the_end_is_a_failure(toys, context, monkeypatch):
    run = context(Weights(), toys.two_bn())

    def slower(*arguments, **named):
        run.latency.factor = 1.2  # the machine became busy after pruning
        return trained(*arguments, **named)

    trained = prune_module.go_on_with
    monkeypatch.setattr(prune_module, "go_on_with", slower)
    whole = 1e-3 * weights_of(run.teacher.model)
    pruning(toys, target=Target(latency_ms=0.6 * whole)).run(run)
    student = run.metrics["student.latency_ms"]
    if student > 1.05 * 0.6 * whole:
        (failure,) = run.failures
        assert f"takes {student:.3f} ms and was to take {0.6 * whole:.3f} ms" in failure
    else:
        pytest.fail("the toy is too coarse for this test")


def test_finetuning_between_rounds_changes_what_goes_on_being_pruned(toys, context):
    plain, tuned = context(Weights(), toys.two_bn()), context(Weights(), toys.two_bn())
    pruning(toys).run(plain)
    tuned.folder = plain.folder / "tuned"
    between = Recovery(steps=2, batch_size=8, precision="float32")
    pruning(toys, finetune=between).run(tuned)
    assert tuned.metrics["training.steps"] > plain.metrics["training.steps"]


def test_every_pause_draws_other_images(toys, context, monkeypatch):
    seeds = []

    def teach(context, student, images, options, stage, resumable):
        seeds.append((stage, context.seed, resumable))

    work = context(Weights(), toys.two_bn())
    work.seed = 7
    monkeypatch.setattr(prune_module, "train_student", teach)
    between = Recovery(steps=2, batch_size=8, precision="float32")
    pruning(toys, finetune=between, step=0.1).run(work)
    assert len(seeds) > 1
    assert seeds == [(f"finetune {n}", 7 + 1000 * n, False) for n in range(1, len(seeds) + 1)]


class Interrupted(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "between",
    [
        {},
        {"reconstruction": Reconstruction(images=24, batch_size=8), "reconstruct_each": True},
        {"finetune": Recovery(steps=2, batch_size=8, precision="float32", soft_loss="l1", ema=0.9)},
    ],
    ids=["plain", "fitted", "trained"],
)
@pytest.mark.parametrize("where", ["second round", "recovery"])
def test_a_pruning_that_is_killed_ends_like_an_undisturbed_one(
    toys, context, monkeypatch, where, between
):
    given = {"criteria": (Term("random", 1.0, Random()),), "step": 0.1} | between
    options = pruning(toys, **given)
    whole = context(Weights(), toys.two_bn())
    whole.folder = whole.folder / "whole"
    options.run(whole)

    parts = context(Weights(), toys.two_bn())
    parts.folder = parts.folder / "parts"
    with monkeypatch.context() as patch:
        if where == "recovery":
            patch.setattr(prune_module, "go_on_with", raising)
        else:
            after = prune_module._Pruning._look

            def look(self, removed):
                if self.rounds == 2:
                    raise Interrupted
                return after(self, removed)

            patch.setattr(prune_module._Pruning, "_look", look)
        with pytest.raises(Interrupted):
            options.run(parts)
    again = context(Weights(), toys.two_bn())
    again.folder = parts.folder
    options.run(again)
    assert any("pruning: going on after round" in note for note in again.log.notes)
    assert again.metrics["pruned.rounds"] == whole.metrics["pruned.rounds"] > 1
    assert again.details == whole.details
    assert again.metrics.keys() == whole.metrics.keys()
    file = "student/model.safetensors"
    assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def raising(*arguments, **named):
    raise Interrupted


def test_a_checkpoint_of_another_teacher_is_refused(toys, context, monkeypatch):
    run = context(Weights(), toys.two_bn())
    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "go_on_with", raising)
        with pytest.raises(Interrupted):
            pruning(toys).run(run)
    with pytest.raises(StoreError, match="delete it to prune from the start"):
        pruning(toys, images=Images(toys.images(16))).run(run)


def test_a_pruned_student_is_pruned_further(toys, context):
    run = context(Weights(), toys.two_bn())
    pruning(toys).run(run)
    first = read_artifact(run.folder / "student")
    model = toys.two_bn()
    PruningRecord.from_json(first.pruning_record).rebuild(model)
    model.load_state_dict(first.state)
    again = context(Weights(), model.eval())
    again.teacher.pruning_record = first.pruning_record
    again.folder = run.folder / "again"
    pruning(toys).run(again)
    second = read_artifact(again.folder / "student")
    fresh = toys.two_bn()
    PruningRecord.from_json(second.pruning_record).rebuild(fresh)
    fresh.load_state_dict(second.state)
    assert weights_of(fresh) < weights_of(model)
