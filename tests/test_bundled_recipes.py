"""Recipes that come with dreamkit, by name, from a clone and from a wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamkit.errors import RecipeError
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.recipe.bundled import bundled_recipes, describe, find_recipe

Invoke = Callable[..., Any]
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = {file.relative_to(ROOT / "recipes").with_suffix("").as_posix() for file in FILES}


def test_every_recipe_is_listed(invoke: Invoke) -> None:
    assert {"quickstart", "cifar10/prune_ha"} < NAMES
    assert set(bundled_recipes()) == NAMES
    code, out, err = invoke("recipes")
    assert (code, err) == (0, "")
    assert set(out.splitlines()) > NAMES
    assert "    teacher: bundled:digits_resnet8\n" in out
    assert f"The files lie in {ROOT / 'recipes'}.\n" in out
    assert all(len(line) <= 200 and line == line.rstrip() for line in out.splitlines())
    rows = json.loads(invoke("recipes", "--json").out)
    assert {row["recipe"] for row in rows} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_recipe_says_what_it_needs(name: str) -> None:
    text = bundled_recipes()[name].read_text()
    facts = describe(bundled_recipes()[name])
    assert all(facts.values()), facts
    assert ("dreamkit[demo]" in facts["needs"]) == ("source: digits" in text)
    downloads = "source: torchvision" in text or "source: timm" in text
    assert ("downloaded" in facts["needs"]) == downloads


@pytest.mark.parametrize(
    "named", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"]
)
def test_a_recipe_is_found_by_name_wherever_one_is(
    named: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe(named) == file
    assert invoke("validate", named) == (0, f"{file} is valid\n", "")


def test_one_within_reach_is_called_by_its_short_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert find_recipe("cifar10/prune_ha") == Path("recipes/cifar10/prune_ha.yaml")


def test_a_mistake_in_one_has_its_place(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = invoke("run", "quickstart", "--set", "synthesis.images=0")
    assert code == 2
    assert err.startswith("error: --set synthesis.images: ")
    code, _, err = invoke("validate", "quickstart", "--preset", "smok")
    assert err.startswith("error: recipes/quickstart.yaml: no preset 'smok'; did you mean 'smoke'?")


def test_a_file_of_ones_own_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("name: mine\n")
    assert find_recipe("quickstart.yaml") == Path("quickstart.yaml")
    assert find_recipe("quickstart") == ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("quickstrat", "; did you mean 'quickstart'?"),
        ("recipes/quickstrat.yaml", "; did you mean 'quickstart'?"),
        ("prune_ha", "; did you mean 'cifar10/prune_ha'?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_one(named: str, hint: str, invoke: Invoke) -> None:
    message = (
        f"no file '{named}', and no recipe of that name comes with dreamkit{hint} "
        "('dreamkit recipes' lists them)"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        find_recipe(named)
    for command in ("run", "validate"):
        assert invoke(command, named) == (2, "", f"error: {message}\n")


def unpacked(archive: Path, folder: Path) -> Path:
    if archive.suffix == ".gz":
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        return next(folder.iterdir())
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def built(kind: str, source: Path, target: Path) -> Path:
    target.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(target.iterdir())


@pytest.mark.slow
def test_a_wheel_has_them_and_runs_one_without_a_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "data", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, clone, ignore=ignored)
    source = unpacked(built("sdist", clone, tmp_path / "sdist"), tmp_path / "source")
    installed = unpacked(built("wheel", source, tmp_path / "wheel"), tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def dreamkit(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dreamkit", *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {row["recipe"] for row in json.loads(dreamkit("recipes", "--json"))} == NAMES
    assert f"The files lie in {installed / 'dreamkit' / 'recipes'}" in dreamkit("recipes")
    dreamkit("run", "quickstart", "--preset", "smoke")
    assert (elsewhere / "runs" / "quickstart-smoke" / "report.json").is_file()
    dreamkit("new", "my.yaml", "--from", "prune", "--teacher", "timm:resnet18")
    assert dreamkit("validate", "my.yaml") == "my.yaml is valid\n"


PIXELS = {"parameterisation.name": "pixels", "schedule": "constant", "clip": False, "lr": 0.05}
SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "warmup": 0.0, "ema": None}
CIFAR = {**SGD, "lr": 0.1, "batch_size": 256, "schedule": "step", "milestones": [0.4, 0.8]}
ALONE = {"soft_loss.name": "kl", "features": 0.0, "clip_norm": None, "augmentation.mixup": 0.0}
CIFAR |= {"temperature": 3.0, "weight_decay": 5e-4, **ALONE}
FAST = {**SGD, "lr": 0.2, "batch_size": 256, "schedule": "cosine", "weight_decay": 1e-4}
FAST |= {"temperature": 20.0, **ALONE}
RANKED = {
    "criteria": [
        {"name": "taylor", "weight": 1.0, "loss": "exact_kl", "squares": "batch"}
        | {"temperature": 5.0, "ema": 0.0},
        {"name": "latency_lut", "weight": 0.01},
    ],
    "normalise": "none",
    "selection.name": "greedy",
    "reconstruction": None,
    "finetune": None,
    "ranking_batches": 30,
}
RECOVERED = {**SGD, "lr": 1e-3, "schedule": "step", "milestones": [0.333, 0.667]}
PAPERS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    *((f"cifar10/{name}", PIXELS, {}, CIFAR) for name in ("deepdream", "deepinversion")),
    ("cifar10/adaptive", PIXELS, {"adaptive.every": 50}, CIFAR),
    ("cifar10/noise", {"schedule": "constant", "lr": 0.05}, {}, CIFAR),
    ("cifar10/dafl", {"latent": 1000}, {}, CIFAR),
    ("cifar10/cmi", {"steps": 500, "lr": 1e-3}, {}, FAST),
    ("cifar10/fast_meta", {"steps": 5, "lr": 3e-3, "lr_noise": 1e-2}, {}, FAST),
    (
        "cifar10/nayer",
        {"batch_size": 400, "steps": 40, "lr": 4e-3, "cross_entropy": 0.5, "latent": 1000}
        | {"width": 64, "reset_every": 20, "smoothing": 0.9},
        {"adaptive.every": 400, "adaptive.batches": 2},
        {**FAST, "batch_size": 512},
    ),
    ("cifar10/prune_ha", PIXELS, RANKED, RECOVERED),
    (
        "prune_resnet50_ha",
        {**PIXELS, "batch_size": 152},
        {**RANKED, "step": 0.0028, "limits.chunk": 16, "batch_size": 256},
        {**RECOVERED, "epochs": 30, "batch_size": 256, "temperature": 5.0},
    ),
    (
        "imagenet/transfer_resnet50",
        {**PIXELS, "batch_size": 152},
        {},
        {**SGD, **ALONE, "epochs": 90, "batch_size": 1024, "lr": 1.024, "temperature": 3.0},
    ),
]


@pytest.mark.parametrize(("name", "synthesis", "application", "training"), PAPERS)
def test_a_paper_preset_has_the_papers_values(
    name: str, synthesis: dict[str, Any], application: dict[str, Any], training: dict[str, Any]
) -> None:
    overrides = ["evaluation=null"]
    loaded = read_recipe(find_recipe(name), build_registries, "paper", overrides)
    whole = loaded.resolved()
    done = whole["application"]
    taught = done["recovery"] if "recovery" in done else done["training"]
    for part, expected in (
        (whole["synthesis"], synthesis),
        (done, application),
        (taught, training),
    ):
        found = {}
        for path in expected:
            found[path] = part
            for step in path.split("."):
                found[path] = found[path][step]
        assert found == expected
