from __future__ import annotations

import configparser
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dreamkit_example import hooks
from dreamkit_example.color_balance import ColorBalance
from dreamkit_example.weight_std import WeightStd, filter_std
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import RecipeError
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.recipe import build_entry
from dreamkit.registry import Registries
from dreamkit.types import ChannelGroup, InversionStep, Member, PruningStep

EXAMPLE = Path(__file__).resolve().parents[1]


def inversion_step(images: torch.Tensor) -> InversionStep:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return InversionStep(images, labels, teacher_logits=torch.zeros(len(images), 2))


def pruning_step(model: nn.Module, groups: list[ChannelGroup]) -> PruningStep:
    def no_data():
        raise AssertionError("weight_std reads no data")

    return PruningStep(
        model=model,
        teacher=model,
        groups=groups,
        card=Card("toy", (1, 4, 4), (0.0,), (1.0,), 2, "test"),
        chunks=[],
        device=torch.device("cpu"),
        batches=no_data,
        latency=None,
        generator=torch.Generator(),
    )


@pytest.fixture
def registries() -> Registries:
    """The example's entries alone; an installed copy of it does not get in the way."""
    made = Registries()
    hooks.register_regularizers(partial(made["regularizers"].register, provider="example"))
    hooks.register_criteria(partial(made["criteria"].register, provider="example"))
    return made


# Channel means over the batch: 4 and -1.
IMAGES = torch.tensor([[[[1.0, 3.0]], [[-3.0, 1.0]]], [[[5.0, 7.0]], [[0.0, -2.0]]]])


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1.0, 2.5),  # (4 + 1) / 2
        (2.0, 8.5),  # (16 + 1) / 2
        (3.0, 32.5),  # (64 + 1) / 2
    ],
)
def test_color_balance_is_the_mean_power_of_channel_means(power, expected):
    value = ColorBalance(power)(inversion_step(IMAGES))
    assert value.shape == ()
    assert value.item() == pytest.approx(expected)


def test_color_balance_pulls_each_channel_towards_zero():
    images = IMAGES.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(ColorBalance()(inversion_step(images)), [images])
    # d/dx mean_c(m_c²) = 2·m_c / (2 channels · 4 pixels a channel)
    assert torch.equal(gradient[:, 0], torch.full((2, 1, 2), 1.0))
    assert torch.equal(gradient[:, 1], torch.full((2, 1, 2), -0.25))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_color_balance_is_zero_without_gradient_at_grey(power):
    images = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = ColorBalance(power)(inversion_step(images))
    (gradient,) = torch.autograd.grad(value, [images])
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(images))


def test_filter_std_is_the_population_deviation_of_each_filter():
    weight = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    assert filter_std(weight).tolist() == [1.0, 0.0]
    # A depthwise 1x1 filter has a single weight, which does not deviate.
    assert filter_std(torch.tensor([[[[5.0]]]])).tolist() == [0.0]


def test_weight_std_sums_producers_by_group_channel_and_skips_the_rest():
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(1, 2, (1, 2)), "linear": nn.Linear(2, 3), "norm": nn.BatchNorm2d(2)}
    )
    with torch.no_grad():
        model["conv"].weight.copy_(torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]]))  # 1, 0
        model["linear"].weight.copy_(torch.tensor([[0.0, 4.0], [1.0, 1.0], [0.0, 6.0]]))  # 2, 0, 3
        model["norm"].weight.copy_(torch.tensor([7.0, 9.0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    both = torch.tensor([0, 1])
    coupled = ChannelGroup(
        "conv",
        2,
        (
            Member("conv", "out", both, both),
            # The linear layer's channel 2 meets the group's channel 0, and 0 meets 1.
            Member("linear", "out", torch.tensor([2, 0]), both),
            Member("norm", "out", both, both),
            Member("linear", "in", both, both),
        ),
    )
    alone = ChannelGroup("conv", 2, (Member("conv", "out", both, both),))

    scores = WeightStd()(pruning_step(model, [coupled, alone]))

    assert [score.tolist() for score in scores] == [[1.0 + 3.0, 0.0 + 2.0], [1.0, 0.0]]
    assert not any(score.requires_grad for score in scores)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weight_std_scores_the_groups_that_dreamkit_finds():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, (1, 2), groups=3, bias=False),
        nn.Flatten(),
        nn.Linear(3 * 4 * 3, 2),
    ).eval()
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[0.0, 2.0], [0.0, 8.0], [0.0, 4.0]])[:, None, None])
    groups, _ = ChannelGraph(model, (1, 4, 4)).groups()
    (scores,) = WeightStd()(pruning_step(model, groups))
    # The first layer's filters have one weight each; the depthwise ones deviate by half their step.
    assert scores.tolist() == [1.0, 4.0, 2.0]


def test_entries_are_built_with_their_options(registries):
    made = build_entry(registries, "regularizers", {"name": "color_balance", "power": 1})
    assert made == ColorBalance(1.0)
    assert build_entry(registries, "criteria", {"name": "weight_std"}) == WeightStd()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.5}, r"power: should be greater than or equal to 1 \(got 0.5\)"),
        ({"power": "two"}, "power: should be a valid number"),
        ({"powr": 2}, "powr: unknown option; did you mean 'power'"),
    ],
)
def test_wrong_options_are_refused(registries, options, message):
    with pytest.raises(RecipeError, match=message):
        build_entry(registries, "regularizers", {"name": "color_balance", **options})


def test_entry_point_names_a_module_that_imports_no_torch():
    config = configparser.ConfigParser()
    config.read(EXAMPLE / "setup.cfg")
    name, _, target = config["options.entry_points"]["dreamkit"].strip().partition(" = ")
    assert (name, target) == ("example", hooks.__name__)
    code = f"import sys, {target}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
