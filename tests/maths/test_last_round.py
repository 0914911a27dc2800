"""The last round ends at the target, and targets out of reach are refused at once."""

from __future__ import annotations

import pytest
from torch import nn

from dreamkit.applications.prune import Prune
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.errors import NothingToPrune, PluginError
from dreamkit.pruning.knapsack import Knapsack
from dreamkit.pruning.selection import Greedy, LayerLimits, Limits
from dreamkit.registry import Term
from dreamkit.stages import budget
from dreamkit.stages.budget import Target
from dreamkit.stages.forecast import Forecast
from dreamkit.stages.importances import Importances
from dreamkit.stages.last_round import LastRound
from dreamkit.stages.pruning_run import PruningRun
from dreamkit.stages.samples import parted
from dreamkit.stages.teaching import Recovery
from dreamkit.types import ChannelGroup, Chunk, Selection

SIZE = (3, 8, 8)
SELECTIONS = {"greedy": Greedy(), "per cost": Greedy(per="cost"), "knapsack": Knapsack()}


class Weighed:
    """A network of 1,000 FLOPs, of which a group's channels cost what they are told to."""

    def __init__(self, costs):
        self.left = 1000.0
        self.costs = costs

    def take(self, group, channels):
        self.left -= channels * self.costs[group.name]

    def total(self, cost):
        return self.left


def ending(scores, costs, chosen, goal):
    """Return a last round of chunks of one channel, whose scores are given by group."""
    chunks = [
        [Chunk(ChannelGroup(name, 100, ()), [n], score) for n, score in enumerate(of_group)]
        for name, of_group in scores.items()
    ]
    flops = {"flops": lambda shape: 0.0}
    forecast = Forecast(Weighed(costs), flops, {"flops": 1.0}, 200, {"flops": goal})
    return LastRound(chunks, chosen, forecast)


def removed(last):
    return {name: len(channels) for name, channels in last.chosen().items()}


def test_what_the_target_does_not_need_is_given_back_the_most_important_first():
    chosen = {"a": [0], "b": [0, 1, 2]}
    last = ending({"a": [1, 2], "b": [3, 4, 5]}, {"a": 10, "b": 1}, chosen, 0.986)
    assert not last.met, "1.3 % go"
    last = ending({"a": [1, 2], "b": [3, 4, 5]}, {"a": 10, "b": 1}, chosen, 0.9885)
    assert last.met
    last.trim(swap=False)
    assert last.chosen() == {"a": [0], "b": [0, 1]}
    last = ending({"a": [5, 6], "b": [1, 2, 3]}, {"a": 10, "b": 1}, chosen, 0.997)
    last.trim(swap=False)
    assert last.chosen() == {"b": [0, 1, 2]}


def test_small_chunks_take_the_place_of_one_that_leads_too_far():
    for swap, expected in ((False, {"a": 1}), (True, {"b": 10})):
        last = ending({"a": [1, 2], "b": [3.0] * 20}, {"a": 20, "b": 1}, {"a": [0]}, 0.99)
        last.trim(swap)
        assert removed(last) == expected


def test_a_large_chunk_that_is_near_enough_stays():
    last = ending({"a": [1, 2], "b": [3.0] * 20}, {"a": 14, "b": 1}, {"a": [0]}, 0.99)
    last.trim(swap=True)
    assert removed(last) == {"a": 1}


@pytest.mark.parametrize("chunks", [0, 5])
def test_where_small_chunks_do_not_lead_there_the_large_one_stays(chunks):
    scores = {"a": [1, 2], "b": [3.0] * chunks}
    last = ending(scores, {"a": 20, "b": 1}, {"a": [0]}, 0.99)
    last.trim(swap=True)
    assert removed(last) == {"a": 1}
    assert last.met


@pytest.mark.parametrize(
    "chosen",
    [{"a": [1]}, {"a": [0, 0]}, {"a": [0, 1, 2]}, {"c": [0]}],
    ids=["a later one", "one twice", "more than may go", "of no group"],
)
def test_a_selection_that_breaks_its_contract_is_refused(chosen):
    with pytest.raises(PluginError, match="none before an earlier one"):
        ending({"a": [1, 2], "b": [3]}, {"a": 10, "b": 1}, chosen, 0.99)


# --- whole runs -------------------------------------------------------------------------------


def network(toys):
    """Return a network of a hundred channels, each a percent or so of its FLOPs."""
    layers = [nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.ReLU()]
    return toys.teacher(toys.fill(nn.Sequential(*layers, nn.Flatten(), nn.Linear(960, 3))))


class Padded(nn.Conv2d):
    """A convolution that pads by a layer of its own."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x):
        return super().forward(self.pad(x))


class PaddedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Padded(3, 40), nn.ReLU(), Padded(40, 60), nn.ReLU())
        self.fc = nn.Linear(60, 3)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


def reached(options, teacher, images, context):
    run = PruningRun(options, teacher, context)
    run.begin(parted(images, 0, lambda text: None))
    run.reach_target()
    return run


def pruning(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(flops=0.63),
        "recovery": Recovery(epochs=0, batch_size=8),
        "limits": Limits(min_channels=1),
        "step": 0.2,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("goal", ["flops", "params", "channels"])
def test_the_result_is_within_a_channel_of_the_target(toys, context, selection, goal):
    options = pruning(target=Target(**{goal: 0.63}), selection=selection)
    run = reached(options, network(toys), toys.images(8, size=SIZE), context)
    # By half a point, or by a channel where that is more: one of a hundred, or of the first forty.
    nearest = {"flops": 0.012, "params": 0.017, "channels": 0.005}[goal]
    assert 0.63 - nearest <= run.shares[goal] <= 0.63


class Idle(Selection):
    """A selection that names groups and takes nothing of them."""

    def __call__(self, step):
        return {chunks[0].group.name: [] for chunks in step.chunks}


def test_a_selection_that_takes_nothing_ends_the_run(toys, context):
    with pytest.raises(NothingToPrune, match="out of reach"):
        reached(pruning(selection=Idle()), network(toys), toys.images(8, size=SIZE), context)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_convolutions_that_pad_in_a_layer_of_their_own_are_pruned_no_further(
    toys, context, selection
):
    options = pruning(selection=selection, step=0.3)
    model = toys.fill(PaddedNetwork())
    run = reached(options, toys.teacher(model), toys.images(8, size=SIZE), context)
    assert 0.60 <= run.shares["flops"] <= 0.63


class Hopeful(Forecast):
    """A forecast that takes what goes for a tenth more than it is."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first = {name: super(Hopeful, self)._share(name) for name in self.goals}

    def _share(self, name):
        return self.first[name] - 1.1 * (self.first[name] - super()._share(name))


def test_what_counting_finds_lacking_goes_in_the_same_round(toys, context, monkeypatch):
    monkeypatch.setattr(budget, "Forecast", Hopeful)
    ranked = []
    rank = Importances._by_criteria
    monkeypatch.setattr(Importances, "_by_criteria", lambda *args: ranked.append(1) or rank(*args))
    run = reached(pruning(step=1.0), network(toys), toys.images(8, size=SIZE), context)
    assert 0.61 <= run.shares["flops"] <= 0.63
    assert (run.rounds, len(ranked)) == (1, 1)
    assert len(run.removed) > 1


@pytest.mark.parametrize("name", ["per cost", "knapsack"])
def test_what_groups_save_together_is_less_and_the_rest_goes_in_the_same_round(toys, context, name):
    """Both groups meet in the second convolution, whose savings are told for each by itself."""
    limits = Limits(max_ratio=0.3, min_channels=1)
    options = pruning(selection=SELECTIONS[name], step=0.4, limits=limits)
    run = reached(options, network(toys), toys.images(8, size=SIZE), context)
    assert len(run.removed) > 1
    assert run.rounds == 1
    assert 0.618 <= run.shares["flops"] <= 0.63


def test_channel_by_channel_a_round_removes_no_more_than_its_step(toys, context):
    options = pruning(target=Target(flops=0.7), step=0.1)
    run = reached(options, network(toys), toys.images(8, size=SIZE), context)
    assert len(run.removed) == run.rounds
    assert all(sum(map(len, chosen.values())) <= 10 for chosen in run.removed)


# --- out of reach -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "reach"),
    [
        ({"flops": 0.2}, r"flops 0\.\d+ \(target 0\.200\)"),
        ({"params": 0.2}, r"params 0\.\d+ \(target 0\.200\)"),
        ({"flops": 0.9, "channels": 0.2}, r"channels 0\.5\d+ \(target 0\.200\)"),
    ],
)
def test_a_target_out_of_reach_is_refused_before_any_image_is_wanted(toys, context, target, reach):
    options = pruning(target=Target(**target), limits=Limits(max_ratio=0.5))
    with pytest.raises(NothingToPrune, match=reach) as refused:
        options.run(network(toys), None, context)
    assert refused.value.path == ("target",)


def test_what_is_named_as_reachable_is_reachable(toys, tmp_path):
    limits = Limits(max_ratio=0.5, exceptions=(LayerLimits("0", max_ratio=0.1),))
    with pytest.raises(NothingToPrune) as refused:
        pruning(target=Target(flops=0.2), limits=limits).run(
            network(toys), None, toys.context(tmp_path / "refused")
        )
    reach = float(refused.value.message.split("flops ")[1].split()[0])
    options = pruning(target=Target(flops=reach + 0.001), limits=limits)
    context = toys.context(tmp_path / "reached")
    run = reached(options, network(toys), toys.images(8, size=SIZE), context)
    assert run.shares["flops"] == pytest.approx(reach, abs=2e-3)


def test_what_shapes_do_not_tell_of_is_counted_before_a_refusal(toys, context, monkeypatch):
    monkeypatch.setattr(Forecast, "met", lambda forecast: False)
    run = PruningRun(pruning(), network(toys), context)
    assert run.shares["flops"] == 1.0  # not refused: the forecast alone said that nothing is enough
