"""What removing a part of each group does, measured before anything is cut."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F

from dreamkit import distributed
from dreamkit.applications.prune import Prune
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.errors import NothingToPrune, OptionError
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.selection import LayerLimits, Limits
from dreamkit.registry import Term
from dreamkit.report.html import render
from dreamkit.report.run_log import MemoryLog
from dreamkit.report.tables import sensitivity_rows
from dreamkit.stages import pruning_run, pruning_state
from dreamkit.stages.budget import Target
from dreamkit.stages.sensitivity import Measured, Sensitivity, measure_sensitivity
from dreamkit.stages.teaching import Recovery
from dreamkit.types import ChannelGroup, LatencyBackend, Member, Timing

SIZE = (3, 8, 8)
MEASURED = Measured(
    (0.1, 0.3, 0.5),
    {"a": [1.0, 0.96, 0.8], "b#2": [0.94, 1.0, 1.0], "c": [1.0, 1.0, 0.99]},
    {"a": [0.1, 0.5, 1.1], "b#2": [0.4, 0.2, 0.3], "c": [0.0, 0.0, 0.0]},
)


def as_it_is(model, record):
    """Leave BatchNorm's statistics alone."""


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


def look(toys, context, take=as_it_is, **options):
    teacher = toys.teacher(toys.two_bn())
    graph = ChannelGraph(copy.deepcopy(teacher.model), SIZE)
    scores = {"conv1": torch.tensor([4.0, 1, 3, 2]), "conv2": torch.arange(6.0)}
    options = Sensitivity(**{"shares": (0.25, 0.5), "images": 8} | options)
    leave = [lambda model, removed: None, take]
    found = measure_sensitivity(graph, teacher, scores, options, toys.images(8), *leave, context)
    return found, teacher, graph


def test_what_is_measured_is_what_a_removal_does(toys, context):
    found, teacher, graph = look(toys, context)
    assert found.shares == (0.25, 0.5)
    assert set(found.agreement) == set(found.divergence) == {"conv1", "conv2"}
    x = teacher.card.normalise(toys.images(8).batch(range(8))[0])
    removals = {"conv1": [[1], [1, 3]], "conv2": [[0, 1], [0, 1, 2]]}
    for name, of_each in removals.items():
        for number, gone in enumerate(of_each):
            smaller = copy.deepcopy(teacher.model)
            ChannelGraph(smaller, SIZE).remove({name: gone})
            with torch.no_grad():
                ours, theirs = smaller(x), teacher.model(x)
            same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
            assert found.agreement[name][number] == float(same)
            p = theirs.softmax(1)
            apart = (p * (p.log() - F.log_softmax(ours, 1))).sum(1).mean()
            assert found.divergence[name][number] == pytest.approx(float(apart), rel=1e-4)
    toys.assert_same_tensors(graph.model, teacher.model)
    assert graph.pruning_record.kept == {}


def test_statistics_are_taken_of_each_copy_and_what_it_lacks(toys, context):
    seen = []

    def take(model, record):
        seen.append((model.conv1.out_channels, model.conv2.out_channels, record.kept))
        model.bn1.running_mean.zero_()

    found, teacher, _ = look(toys, context, take)
    assert [sizes[:2] for sizes in seen] == [(4, 6), (3, 6), (2, 6), (4, 4), (4, 3)]
    assert seen[0][2] == {}
    assert [lacks["conv2.weight"][:2] for *_, lacks in seen[1:]] == [
        [None, [0, 2, 3]],
        [None, [0, 2]],
        [[2, 3, 4, 5], None],
        [[3, 4, 5], None],
    ]
    assert not torch.equal(teacher.model.bn1.running_mean, torch.zeros(4))
    plain = look(toys, context)[0]
    assert found != plain
    assert (plain.whole_agreement, plain.whole_divergence) == (1.0, 0.0)
    assert found.whole_divergence > 0, "its statistics are not its teacher's either"


def test_one_channel_is_left_of_each_group(toys, context):
    sizes = []
    look(
        toys, context, lambda model, _: sizes.append(model.conv1.out_channels), shares=(0.01, 0.99)
    )
    assert sizes == [4, 3, 1, 4, 4]


def test_importances_add_up_to_what_was_measured():
    score = torch.tensor([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 10])
    found = MEASURED.importances(
        {"a": score, "b#2": score, "c": score}, dict.fromkeys(["a", "b#2", "c"], 10)
    )
    for name, importance in found.items():
        assert torch.equal(importance.argsort(stable=True), score.argsort(stable=True)), name
    lowest_first = found["a"][score.argsort()]
    assert lowest_first.cumsum(0)[[0, 2, 4]].tolist() == pytest.approx([0.1, 0.5, 1.1], rel=1e-3)
    # 0.1, 0.2 and 0.3 a channel in the middles of the parts: it grows by 0.05 a channel.
    beyond = [0.3 + 0.05 * n for n in (1.5, 2.5, 3.5, 4.5, 5.5)]
    assert lowest_first[5:].tolist() == pytest.approx(beyond, rel=1e-3)
    # Less lost by more channels is a slip: 0.2 for three is on the hull, and 0.4 for one is not.
    lowest_first = found["b#2"][score.argsort()]
    assert lowest_first.cumsum(0)[[2, 4]].tolist() == pytest.approx([0.18, 0.3], rel=1e-3)
    assert float(found["c"].sum()) < 1e-9


def test_what_one_share_tells_grows_on_from_nothing():
    told = Measured((0.5,), {"a": [0.9]}, {"a": [1.0]})
    importance = told.importances({"a": torch.arange(10.0)}, {"a": 10})["a"]
    assert float(importance[:5].sum()) == pytest.approx(1.0, rel=1e-3)
    assert importance[5:].tolist() == pytest.approx([0.44, 0.52, 0.6, 0.68, 0.76], rel=1e-3)


def test_what_statistics_alone_lose_is_no_groups_loss():
    """Recalibrated on dreams, a network agrees less before anything is removed."""
    told = Measured((0.5,), {"a": [0.7], "b": [0.8]}, {"a": [2.5], "b": [2.0]}, 0.8, 2.0)
    assert floors(Limits(), 0.05, told) == [10, 5, 2, 2]
    found = told.importances(dict.fromkeys("ab", torch.arange(10.0)), dict.fromkeys("ab", 10))
    assert float(found["a"][:5].sum()) == pytest.approx(0.5, rel=1e-3)
    assert float(found["b"].sum()) < 1e-9
    rows = sensitivity_rows({"details": {"sensitivity": told.to_json()}})[1]
    assert rows[0] == ["(nothing)", "0.8000"]


def test_ranks_share_the_trials(toys, context, monkeypatch):
    alone, of_ranks, together, tried = look(toys, context)[0], [], None, []

    def gather(found):
        of_ranks.append(found)
        return of_ranks

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "anywhere", lambda here: here)
    monkeypatch.setattr(distributed, "gather", gather)
    for rank in (0, 1):  # one after the other: the first has no other's yet
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with suppress(KeyError):
            together = look(toys, context, lambda model, record: tried.append(rank))[0]  # noqa: B023
    assert tried == [0, 0, 0, 1, 1]
    assert together == alone


def test_importances_go_on_where_channels_are_gone():
    whole = MEASURED.importances({"a": torch.arange(10.0)}, {"a": 10})["a"]
    rest = MEASURED.importances({"a": torch.arange(7.0)}, {"a": 10})["a"]
    assert rest.tolist() == pytest.approx(whole[3:].tolist(), rel=1e-3)


def of(name, channels, layer):
    """Return a group whose channels a layer makes."""
    every = torch.arange(channels)
    return ChannelGroup(name, channels, (Member(layer, "out", every, every),))


GROUPS = [of("a", 10, "a"), of("b", 10, "b"), of("b#2", 10, "b"), of("c", 10, "c")]


def floors(limits, max_drop, measured=MEASURED):
    narrowed = measured.narrowed(limits, max_drop, {group.name: 10 for group in GROUPS})
    return [narrowed.floor(group, 10) for group in GROUPS]


def test_limits_let_no_more_go_than_was_harmless():
    assert floors(Limits(), 0.05) == [7, 2, 10, 5]  # nothing is known of b
    assert floors(Limits(), 0.5) == [5, 2, 5, 5]
    assert floors(Limits(max_ratio=0.4), 0.05) == [7, 6, 10, 6]


def test_layers_whose_channels_are_in_two_groups_have_the_limits_of_each():
    first = Measured((0.5,), {"b": [1.0], "b#2": [0.0]}, {"b": [0.0], "b#2": [9.0]})
    assert floors(Limits(), 0.05, first)[1:3] == [5, 10]


@pytest.mark.parametrize(
    ("own", "floor"),
    [
        (LayerLimits("a", max_ratio=0.9), 2),
        (LayerLimits("a", max_ratio=0.9, min_channels=4), 4),
        (LayerLimits("a", min_channels=4), 7),  # says nothing of how much may go
        (LayerLimits("a", min_channels=8), 8),
    ],
)
def test_an_exception_that_says_how_much_may_go_counts(own, floor):
    assert floors(Limits(exceptions=(own,)), 0.05)[0] == floor


def test_a_drop_that_is_just_allowed_is():
    nine_of_ten = float(torch.tensor([1.0] * 9 + [0.0]).mean())
    told = Measured((0.5,), {"a": [nine_of_ten]}, {"a": [1.0]})
    assert floors(Limits(), 0.1, told)[0] == 5


def test_small_groups_count_by_the_channels_that_were_removed():
    """Of five channels a tenth is one, and 30 and 50 % are two."""
    told = Measured((0.1, 0.3, 0.5), {"a": [1.0, 1.0, 0.0]}, {"a": [0.1, 0.4, 0.4]})
    importance = told.importances({"a": torch.arange(5.0)}, {"a": 5})["a"]
    assert importance[:3].tolist() == pytest.approx([0.1, 0.3, 0.5], rel=1e-3)
    assert told.narrowed(Limits(), 0.05, {"a": 5}).floor(of("a", 5, "a"), 5) == 3


def test_many_channels_keep_the_order_of_the_criteria():
    score = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    importance = MEASURED.importances({"a": score}, {"a": 4096})["a"]
    assert torch.equal(importance.argsort(stable=True), score.argsort(stable=True))


def test_what_was_measured_comes_back_from_json():
    assert Measured.from_json(MEASURED.to_json()) == MEASURED


@pytest.mark.parametrize("shares", [(), (0.3, 0.1), (0.1, 0.1)])
def test_shares_go_up(shares):
    with pytest.raises(ValueError, match="each more than the one before"):
        Sensitivity(shares=shares)


def test_the_report_has_a_table_and_a_picture():
    report = {
        "name": "r",
        "teacher": {"name": "t", "origin": "o"},
        "metrics": {},
        "failures": [],
        "notes": [],
        "versions": {},
        "details": {"sensitivity": MEASURED.to_json()},
    }
    header, rows = sensitivity_rows(report)
    assert header == ["agreement without", "10 %", "30 %", "50 %"]
    assert rows[1] == ["b#2", "0.9400", "1.0000", "1.0000"]
    page = render(report, {}, "", {})
    assert "<td>b#2</td><td>0.9400</td>" in page
    assert page.count("<svg") == 1
    assert "What removing a part" not in render(report | {"details": {}}, {}, "", {})
    assert sensitivity_rows({"details": {}}) == ([], [])


# --- whole runs -------------------------------------------------------------------------------


def pruning(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(params=0.7),
        "recovery": Recovery(epochs=0, batch_size=8),
        "limits": Limits(min_channels=1),
        "sensitivity": Sensitivity(images=8),
        "step": 0.1,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


def test_measured_importance_wants_a_measurement():
    with pytest.raises(OptionError, match="set 'sensitivity' too"):
        pruning(sensitivity=None, importance="measured")


def test_a_run_tells_what_it_measured(toys, context):
    pruning().run(toys.teacher(toys.two_bn()), toys.images(24), context)
    told = Measured.from_json(context.log.details["sensitivity"])
    assert told.shares == (0.1, 0.3, 0.5)
    assert set(told.agreement) == {"conv1", "conv2"}


def test_a_pass_takes_statistics_over_few_images(toys, context, monkeypatch):
    taken = []
    take = pruning_state.take_statistics

    def count(how, student, teacher, kept, batches, **options):
        taken.append(len(batches))
        take(how, student, teacher, kept, batches, **options)

    monkeypatch.setattr(pruning_state, "take_statistics", count)
    options = pruning(statistics_batches=3, sensitivity=Sensitivity((0.5,), images=9))
    options.run(toys.teacher(toys.two_bn()), toys.images(24), context)
    assert taken == [2, 2, 2]  # nine images in batches of 8, of the whole and of each of two groups


@pytest.mark.parametrize("harmless", ["conv1", "conv2"])
def test_channels_go_where_it_was_measured_to_matter_least(toys, context, monkeypatch, harmless):
    divergence = {name: [0.0 if name == harmless else 9.0] for name in ("conv1", "conv2")}
    told = Measured((0.5,), {"conv1": [1.0], "conv2": [1.0]}, divergence)
    monkeypatch.setattr(pruning_run, "measure_sensitivity", lambda *args: told)
    options = pruning(importance="measured", target=Target(params=0.8))
    student = options.run(toys.teacher(toys.two_bn()), toys.images(24), context).student
    stated = student.pruning_record["attributes"]
    assert [name for name in stated if "out_channels" in stated[name]] == [harmless]


class Interrupting(MemoryLog):
    """A log that stops the run at the end of a round."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def record(self, stage, step, numbers):
        if (stage, step) == ("pruning", self.number):
            raise KeyboardInterrupt
        super().record(stage, step, numbers)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_was_stopped_does_not_measure_again(toys, tmp_path, monkeypatch, number):
    options = pruning(importance="measured", sensitivity=Sensitivity(images=8, max_drop=0.6))
    teacher, images = toys.teacher(toys.two_bn()), toys.images(24)
    whole = toys.context(tmp_path / "whole")
    expected = options.run(teacher, images, whole).student
    with pytest.raises(KeyboardInterrupt):
        options.run(teacher, images, toys.context(tmp_path / "parts", log=Interrupting(number)))
    again = toys.context(tmp_path / "parts")
    monkeypatch.setattr(pruning_run, "measure_sensitivity", None)
    student = options.run(teacher, images, again).student
    assert student.pruning_record == expected.pruning_record
    assert again.log.details == whole.log.details
    toys.assert_same_tensors(student.model, expected.model)


def told_of(monkeypatch, agreement):
    """Let the pass find the same agreement for both groups."""
    told = {name: [agreement] for name in ("conv1", "conv2")}
    found = Measured((0.3,), told, {"conv1": [1.0], "conv2": [1.0]})
    monkeypatch.setattr(pruning_run, "measure_sensitivity", lambda *args: found)
    return Sensitivity(images=8, shares=(0.3,), max_drop=0.1)


def test_a_target_that_measured_limits_do_not_allow_is_refused(toys, context, monkeypatch):
    options = pruning(sensitivity=told_of(monkeypatch, 0.95), target=Target(params=0.3))
    message = r"within the limits: params 0\.\d+ .* or sensitivity\.max_drop"
    with pytest.raises(NothingToPrune, match=message) as refused:
        options.run(toys.teacher(toys.two_bn()), toys.images(24), context)
    assert refused.value.path == ("target",)


class Steady(LatencyBackend):
    """A target on which everything takes as long."""

    batch_size = 1

    def describe(self):
        return {"device": "steady"}

    def time(self, modules):
        return [Timing(1.0, 0.0) for _ in modules]


@pytest.mark.parametrize("goal", ["params", "latency"])
def test_where_no_group_may_lose_anything_it_is_said(toys, tmp_path, monkeypatch, goal):
    context = toys.context(tmp_path, latency=Steady())
    options = pruning(sensitivity=told_of(monkeypatch, 0.5), target=Target(**{goal: 0.9}))
    with pytest.raises(NothingToPrune, match="removing 30% of any costs more") as refused:
        options.run(toys.teacher(toys.two_bn()), toys.images(24), context)
    assert refused.value.path == ("sensitivity", "max_drop")
