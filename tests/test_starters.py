"""Recipes to start from: they validate as they are written, and run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.starters.writing import starters
from dreamkit.synthesizers.stage import Stage

Invoke = Callable[..., Any]
TEACHERS = ("bundled:digits_resnet8", "timm:resnet18", "cifar:resnet20")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(invoke: Invoke, application: str, teacher: str) -> str:
    code, out, err = invoke("new", "my.yaml", "--from", application, "--teacher", teacher)
    assert (code, err) == (0, "")
    assert out.startswith("my.yaml written; check it with 'dreamkit validate my.yaml', then ")
    return Path("my.yaml").read_text()


def test_there_is_one_for_every_application() -> None:
    registry = build_registries()["applications"]
    built_in = {name for name in registry if registry.provider(name) == "dreamkit"}
    assert set(starters()) == built_in


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("application", starters())
def test_one_validates_as_it_is_written(invoke: Invoke, application: str, teacher: str) -> None:
    text = new(invoke, application, teacher)
    code, out, err = invoke("validate", "my.yaml")
    assert (code, out) == (0, "my.yaml is valid\n")
    # What only the user has: new images to learn, a network that judges.
    assert all("data/" in line for line in err.splitlines())
    values = [line for line in text.splitlines() if re.match(r" *[-\w]+:? [^#{]*[\w]", line)]
    commented = [line for line in values if "  # " in line]
    assert len(commented) > len(values) / 2
    assert "$" not in text


def test_what_is_known_of_the_teacher_is_filled_in(invoke: Invoke) -> None:
    text = new(invoke, "prune", "timm:resnet18")
    assert "# The trained network: 1000 classes, 3x224x224\n" in text
    recipe = read_recipe("my.yaml", build_registries).recipe
    assert (recipe.name, recipe.teacher.weights, recipe.synthesis.flip) == ("my", "default", True)
    assert [stage.size for stage in recipe.synthesis.stages] == [112, None]
    Path("my.yaml").unlink()
    new(invoke, "synthesize", "timm:vit_tiny_patch16_224")  # of half its size it takes none
    recipe = read_recipe("my.yaml", build_registries).recipe
    assert recipe.synthesis.stages == (Stage(240),)
    Path("my.yaml").unlink()
    assert "Its weights are random: give a path" in new(invoke, "distill", "cifar:resnet20")
    recipe = read_recipe("my.yaml", build_registries).recipe
    assert recipe.teacher.weights is None
    assert recipe.application.student.weights is None


@pytest.mark.parametrize("application", sorted({*starters()} - {"continual", "judge"}))
def test_one_runs(invoke: Invoke, application: str) -> None:
    new(invoke, application, "bundled:digits_resnet8")
    assert invoke("run", "my.yaml", "--preset", "smoke").code == 0
    report = json.loads(Path("runs/my-smoke/report.json").read_text())
    assert report["application"] == application


def test_one_for_new_classes_runs(invoke: Invoke) -> None:
    for folder in ("data/new/train/x", "data/new/test/x"):
        Path(folder).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 60 * number).save(f"{folder}/{number}.png")
    new(invoke, "continual", "bundled:digits_resnet8")
    done = invoke(
        "run", "my.yaml", "--preset", "smoke", "--set", "application.training.batch_size=4"
    )
    assert done.code == 0, done.err
    assert Path("runs/my-smoke/report.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "prun"), "--from prun: no recipe to start from; did you mean 'prune'? (choic"),
        (("--teacher", "resnet18"), "--teacher resnet18: write SOURCE:MODEL, e.g. "),
        (("--teacher", "timm:resnet1"), "timm:resnet1: timm has no model 'resnet1'; did you mean"),
        (("--teacher", "tim:resnet18"), "no source 'tim' among the teachers; did you mean 'timm'?"),
    ],
)
def test_a_mistake_writes_nothing(invoke: Invoke, arguments: Any, message: str) -> None:
    code, out, err = invoke("new", "my.yaml", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert not Path("my.yaml").exists()


def test_a_file_that_is_there_is_left_alone(invoke: Invoke) -> None:
    Path("my.yaml").write_text("mine")
    code, _, err = invoke("new", "my.yaml")
    assert code == 2
    assert err == "error: my.yaml exists already: choose another name, or remove it\n"
    assert Path("my.yaml").read_text() == "mine"
    assert "cannot be written: No such file" in invoke("new", "no/such/my.yaml").err


def test_any_file_name_makes_a_name(invoke: Invoke) -> None:
    assert invoke("new", "été (2).yaml").code == 0
    assert invoke("validate", "été (2).yaml").code == 0
