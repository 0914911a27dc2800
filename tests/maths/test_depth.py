"""Whole residual blocks that go before channels do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dreamkit.applications.prune import Prune
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.errors import ArtifactError
from dreamkit.evaluation.cost import count
from dreamkit.pruning.blocks import Bypass, bypassed, residual_blocks
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.selection import LayerLimits, Limits
from dreamkit.registry import Term
from dreamkit.report.tables import depth_rows
from dreamkit.stages import pruning_run
from dreamkit.stages.budget import Target
from dreamkit.stages.depth import Depth
from dreamkit.stages.pruning_run import PruningRun
from dreamkit.stages.samples import parted
from dreamkit.stages.teaching import Recovery

SIZE = (3, 8, 8)


class Block(nn.Module):
    """Two convolutions with a residual sum around them."""

    def __init__(self, width, inner=None, activation=True):
        super().__init__()
        inner = width if inner is None else inner
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.activation = activation

    def forward(self, x, scale=1.0):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y += x
        return y.relu() if self.activation else y


class Plain(nn.Module):
    """A convolution whose output has its input's shape, and no sum."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


class Tokens(nn.Module):
    """A block with two residual sums, one after the other, as transformers have."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Network(nn.Module):
    """A stem, a stage of blocks, and a head."""

    def __init__(self, *blocks, width=8, classes=3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stage = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def filled(model):
    """Return a network with weights as a training might leave them."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=draw)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draw)
            nn.init.normal_(module.running_mean, std=0.1, generator=draw)
    return model.eval()


def with_idle_block(kind=None):
    """Return a network of three blocks, of which the second adds nothing."""
    model = filled((kind or Network)(Block(8), Block(8), Block(8)))
    nn.init.zeros_(model.stage[1].bn2.weight)
    nn.init.zeros_(model.stage[1].bn2.bias)
    return model


def named(model, size=SIZE):
    return residual_blocks(model, torch.zeros(2, *size))


# --- finding blocks ---------------------------------------------------------------------------


def test_blocks_are_the_innermost_modules_that_add_to_what_they_are_given():
    model = filled(Network(Block(8), Plain(8), Block(8, activation=False)))
    before = copy.deepcopy(model.state_dict())
    assert named(model) == ["stage.0", "stage.2"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_block_with_two_sums_is_one():
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), Tokens(16), nn.Flatten())
    assert named(nn.Sequential(tokens, nn.Linear(48, 2))) == ["0.2"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block(4)

    def forward(self, x):
        return self.block(self.block(self.stem(x))).mean((2, 3))


class Weighted(nn.Module):
    """Adds a multiple of what it is given, which letting that through would not leave."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) + 0.1 * x


def test_what_a_bypass_would_not_do_justice_is_no_block():
    assert named(filled(Twice())) == []
    assert named(filled(Network(Weighted()))) == []
    assert named(filled(Network(nn.ReLU()))) == []
    strided = nn.Sequential(Block(8), nn.Conv2d(8, 8, 3, stride=2))
    assert named(filled(Network(strided))) == ["stage.0.0"]


class Normalising(Network):
    """A network that normalises its images in place."""

    def forward(self, x):
        return super().forward(x.sub_(0.5))


def test_a_network_that_changes_its_images_has_blocks_too():
    assert named(filled(Normalising(Block(8)))) == ["stage.0"]


def test_a_block_is_back_after_a_trial_that_fails():
    model = filled(Network(Block(8)))
    block = model.stage[0]

    def fail():
        with bypassed(model, "stage.0"):
            assert isinstance(model.stage[0], Bypass)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.stage[0] is block


# --- records ----------------------------------------------------------------------------------


def test_a_record_takes_blocks_away_again():
    model = filled(Network(Block(8), Block(8)))
    small, record = copy.deepcopy(model), PruningRecord()
    record.bypass(small, "stage.1")
    again = copy.deepcopy(model)
    read = PruningRecord.from_json(record.to_json())
    read.rebuild(again)
    assert set(again.state_dict()) == set(small.state_dict())
    assert not any(name.startswith("stage.1") for name in again.state_dict())
    later = PruningRecord(bypassed=["stage.0"]).after(read)
    assert later.bypassed == ["stage.1", "stage.0"]
    later.rebuild(copy.deepcopy(model))


def test_a_record_finds_a_shared_weight_by_each_of_its_names():
    model = Network(Block(8), Block(8))
    model.stage[1].conv1.weight = model.stage[0].conv1.weight
    record = PruningRecord({"stage.1.conv1.weight": [[0, 2], None, None, None]})
    record.bypassed.append("stage.0")
    record.rebuild(model)
    assert model.stage[1].conv1.weight.shape == (2, 8, 3, 3)


@pytest.mark.parametrize("names", ["stage.0", [""], [3], {"stage.0": 1}])
def test_a_file_that_claims_no_blocks_is_refused(names):
    with pytest.raises(ArtifactError, match="list of names"):
        PruningRecord.from_json({"bypassed": names})


def test_a_block_that_the_builder_has_not_is_refused():
    with pytest.raises(ArtifactError, match=r"no block 'stage\.7'"):
        PruningRecord(bypassed=["stage.7"]).rebuild(Network(Block(8)))


# --- runs -------------------------------------------------------------------------------------


def pruning(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()),),
        "target": Target(flops=0.6),
        "recovery": Recovery(epochs=0, batch_size=8),
        "limits": Limits(min_channels=1, chunk=1),
        "step": 0.2,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


def images(toys, count=40):
    return toys.images(count, size=SIZE)


def reached(options, teacher, toys, context):
    run = PruningRun(options, teacher, context)
    run.begin(parted(images(toys), 0, lambda text: None))
    run.reach_target()
    return run


def idle(toys):
    return toys.teacher(with_idle_block(), toys.card(SIZE))


def test_a_block_that_adds_nothing_goes_whole_and_channels_do_the_rest(toys, tmp_path):
    teacher = idle(toys)
    context = toys.context(tmp_path)
    run = reached(pruning(), teacher, toys, context)
    assert run.cut.bypassed == ["stage.1"]
    assert 0.55 < run.shares["flops"] <= 0.6  # a block is 0.31 of it
    told = context.log.details["depth"]
    assert told[0]["block"] == "stage.1"
    assert told[0]["gone"]
    assert told[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert told[0]["divergence_by_channels"] > 1e-4
    assert context.log.metrics["pruned.rounds"] >= 2
    header, rows = depth_rows({"details": context.log.details})
    assert [len(row) for row in rows] == [len(header)] * len(rows)
    assert rows[0][0] == "stage.1"
    assert rows[0][-1] == "went"


def test_without_it_outputs_stay(toys, tmp_path):
    teacher = idle(toys)
    run = reached(pruning(target=Target(flops=0.69)), teacher, toys, toys.context(tmp_path))
    assert run.cut.bypassed == ["stage.1"]
    assert run.cut.kept == {}
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(run.student.eval()(x), teacher.model.eval()(x))


def test_blocks_stay_where_channels_do_less_harm(toys, tmp_path):
    model = filled(Network(Block(8, inner=32), Block(8, inner=32)))
    with torch.no_grad():
        for block in model.stage:  # two thirds of what is inside is never heard
            for silent in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
                silent[:22] = 0
            block.bn1.running_mean[:22] = 0
            block.conv2.weight[:, :22] = 0
    context = toys.context(tmp_path)
    options = pruning(target=Target(flops=0.5))
    run = reached(options, toys.teacher(model, toys.card(SIZE)), toys, context)
    assert run.cut.bypassed == []
    (told,) = context.log.details["depth"]
    assert not told["gone"]
    assert 1.5 * told["divergence_by_channels"] < told["divergence"]


def test_the_margin_is_a_number_of_times_the_harm_of_channels(toys, tmp_path):
    model = filled(Network(Block(8), Block(8), Block(8)))

    def first(margin):
        context = toys.context(tmp_path / str(margin))
        teacher = toys.teacher(copy.deepcopy(model), toys.card(SIZE))
        reached(pruning(depth=Depth(margin=margin)), teacher, toys, context)
        return context.log.details["depth"][0]

    told = first(1e-9)
    ratio = told["divergence"] / told["divergence_by_channels"]
    assert not told["gone"]
    assert first(1.01 * ratio)["gone"]
    assert not first(0.99 * ratio)["gone"]


@pytest.mark.parametrize(
    "changes",
    [{"depth": None}, {"target": Target(channels=0.6)}, {"target": Target(flops=0.9)}],
    ids=["asked not to", "channels", "it saves too much"],
)
def test_no_block_goes_where_it_is_not_meant_to(toys, tmp_path, changes):
    teacher = idle(toys)
    context = toys.context(tmp_path)
    run = reached(pruning(**changes), teacher, toys, context)
    assert run.cut.bypassed == []
    assert not any(told["gone"] for told in context.log.details.get("depth", []))


class Asking(Network):
    """A network whose code asks something of its blocks."""

    def forward(self, x):
        return super().forward(x) + 0 * self.stage[1].conv1.weight.mean()


def test_a_block_that_the_code_needs_stays(toys, tmp_path):
    teacher = toys.teacher(with_idle_block(Asking), toys.card(SIZE))
    run = reached(pruning(), teacher, toys, toys.context(tmp_path))
    assert "stage.1" not in run.cut.bypassed
    assert run.shares["flops"] <= 0.6


@pytest.mark.parametrize("said", [{"max_ratio": 0}, {"max_ratio": 0.5}, {"min_channels": 6}])
def test_a_block_of_which_limits_say_how_much_may_go_does_not_go_whole(toys, tmp_path, said):
    limits = Limits(min_channels=1, chunk=1, exceptions=(LayerLimits("stage.1.conv1", **said),))
    run = reached(pruning(limits=limits), idle(toys), toys, toys.context(tmp_path))
    assert "stage.1" not in run.cut.bypassed
    least = said.get("min_channels", 8 - int(8 * said.get("max_ratio", 0)))
    assert run.student.stage[1].conv1.out_channels >= least


class InPlace(Network):
    """Works in place on what its blocks put out, behind a sigmoid that keeps its own."""

    def forward(self, x):
        x = self.stem(x).sigmoid()
        for block in self.stage:
            x = block(x).relu_()
        return self.fc(x.mean((2, 3)))


def test_a_block_without_which_nothing_could_be_learnt_stays(toys, tmp_path):
    model = filled(InPlace(*(Block(8, activation=False) for _ in range(3))))
    for part in (model.stage[0].bn2.weight, model.stage[0].bn2.bias):
        nn.init.zeros_(part)
    teacher = toys.teacher(model, toys.card(SIZE))
    options = pruning(recovery=Recovery(steps=1, batch_size=8))
    outcome = options.run(teacher, images(toys), toys.context(tmp_path))
    assert "stage.0" not in outcome.student.pruning_record["bypassed"]


def test_an_interrupted_run_goes_on_without_its_blocks(toys, tmp_path, monkeypatch):
    teacher = idle(toys)
    options = pruning(step=0.1)
    whole = reached(options, teacher, toys, toys.context(tmp_path / "whole"))
    assert whole.rounds > 2

    class Enough(Exception):
        pass

    def stop(self, *arguments):
        end(self, *arguments)
        raise Enough

    end = pruning_run.PruningRun._end_round
    monkeypatch.setattr(pruning_run.PruningRun, "_end_round", stop)
    for _ in range(2):  # after the blocks, and after the first channels
        with pytest.raises(Enough):
            reached(options, teacher, toys, toys.context(tmp_path / "parts"))
    monkeypatch.undo()
    context = toys.context(tmp_path / "parts")
    rest = reached(options, teacher, toys, context)
    assert rest.cut.bypassed == whole.cut.bypassed == ["stage.1"]
    assert rest.rounds == whole.rounds
    assert [told["gone"] for told in context.log.details["depth"]].count(True) == 1
    toys.assert_same_tensors(rest.student, whole.student)


def test_a_whole_run_keeps_what_it_cut(toys, tmp_path):
    teacher = idle(toys)
    options = pruning(recovery=Recovery(steps=3, batch_size=8), depth=Depth(images=8))
    outcome = options.run(teacher, images(toys), toys.context(tmp_path))
    assert outcome.student.pruning_record["bypassed"] == ["stage.1"]
    again = filled(Network(Block(8), Block(8), Block(8)))
    PruningRecord.from_json(outcome.student.pruning_record).rebuild(again)
    again.load_state_dict(outcome.student.model.state_dict())
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(again.eval()(x), outcome.student.model.eval()(x))
    cost = count(again, SIZE).flops / count(teacher.model, SIZE).flops
    assert 0.55 < cost <= 0.6
