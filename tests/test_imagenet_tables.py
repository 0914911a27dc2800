"""The script of tables 4 and 5 on ImageNet: which channels a rival kept, its rows and its table."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from dreamkit.card import Card
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("tables4_5_imagenet")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 3)).eval()
    for layer in (model[1], model[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    model[1].weight.data[:2] = 1.5  # alike in one of the numbers
    return model


def test_a_pruned_network_tells_which_channels_it_kept(script: ModuleType) -> None:
    teacher, record = network(), PruningRecord()
    student = copy.deepcopy(teacher)
    ChannelGraph(student, (3, 8, 8), record).remove({"0": [0, 5], "3": [2]})
    kept = script.kept_channels(student, teacher)
    assert kept["1.running_mean"] == [[1, 2, 3, 4, 6, 7]] == record.kept["1.running_mean"]
    assert kept["4.running_var"] == [[0, 1, 3, 4, 5]]
    student[1].bias.data.add_(1)
    with pytest.raises(SystemExit, match="1: not a layer"):
        script.kept_channels(student, teacher)


def test_noise_is_drawn_in_normalised_units(script: ModuleType) -> None:
    card = Card("n", (3, 32, 32), (0.5,) * 3, (0.2,) * 3, 3, "o")
    images = script.noise(card, 8, 0)
    assert images.images.dtype == torch.uint8
    x = card.normalise(images.images)
    assert float(x.mean()) == pytest.approx(0, abs=0.02)
    assert float(x.std()) == pytest.approx(1, abs=0.05)  # what is beyond black and white is lost
    assert torch.equal(script.noise(card, 8, 0).images, images.images)
    assert not torch.equal(script.noise(card, 8, 1).images, images.images)


def test_the_table_has_the_cells_that_there_are(script: ModuleType) -> None:
    timed = {"student.torch_ms": 30.0, "teacher.torch_ms": 40.0}
    timed |= {"student.onnxruntime_ms": 5.0, "teacher.onnxruntime_ms": 10.0}
    cell = {
        "told": {"images": 300},
        "pruned.accuracy": 0.2,
        "student.accuracy": 0.4,
        "teacher.accuracy": 0.8,
        "student.agreement": 0.45,
        "student.flops": 0.5e9,
        **timed,
    }
    lines = script.table({("real", 0.63): cell}, [0.8, 0.63]).splitlines()
    assert len(lines) == 3
    cells = [text.strip() for text in lines[2].strip("|").split("|")]
    assert len(cells) == lines[0].count("|") - 1
    assert cells[:2] == ["real", "300"]
    assert cells[2:9] == [""] * 7
    shown = ["0.200", "0.400", "0.500", "0.450", "0.500", "30.00 (0.75)", "5.00 (0.50)"]
    assert cells[9:16] == shown
    assert cells[16] == "74.9"
