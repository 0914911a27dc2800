"""Continual learning, whole, through the command line and its application."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import dreamkit
from dreamkit.applications import continual
from dreamkit.sources.digits import Digits
from dreamkit.stages import training_run
from dreamkit.store.dreams import DreamStore
from dreamkit.teachers.weights import hash_weights
from dreamkit.training.trainer import Trainer

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits" / "continual.yaml"


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def recipe() -> dict:
    """The digits recipe's smoke preset, as data to change."""
    data = yaml.safe_load(RECIPE.read_text())
    smoke = data.pop("presets")["smoke"]
    data["synthesis"] |= smoke["synthesis"]
    data["application"] |= {"images_per_class": 4}
    data["application"]["training"] |= {"epochs": 2}
    return data


def test_the_digits(tmp_path, invoke):
    small = ("--set", "application.training.epochs=20", "--set", "synthesis.stages=[{steps: 100}]")
    small += ("--set", "application.images_per_class=40")
    code, out, _ = invoke("run", RECIPE, *small, "--out", tmp_path / "run")
    assert code == 0
    assert "eight_nine" in out
    report = report_of(tmp_path / "run")
    metrics = report["metrics"]
    assert metrics["step0.base.accuracy"] == metrics["teacher.accuracy"] >= 0.98
    for step, sets in enumerate([("base",), ("base", "seven"), ("base", "seven", "eight_nine")]):
        known = [metrics[f"step{step}.{name}.accuracy"] for name in sets]
        assert metrics[f"step{step}.combined"] == pytest.approx(sum(known) / len(known))
    lost = [
        max(metrics[f"step{step}.{name}.accuracy"] for step in steps)
        - metrics[f"step2.{name}.accuracy"]
        for name, steps in {"base": (0, 1), "seven": (1,)}.items()
    ]
    assert metrics["step2.forgetting"] == pytest.approx(sum(lost) / 2)
    assert metrics["student.combined"] == metrics["step2.combined"] > 0.6
    assert metrics["student.accuracy"] == metrics["step2.accuracy"]

    student = dreamkit.load_student(tmp_path / "run" / "student")
    assert student.card.class_names == tuple("0123456789")
    held_out = Digits("test").open(student.card)
    with torch.no_grad():
        stored, labels = held_out.batch(range(len(held_out)))
        right = student(student.card.normalise(stored)).argmax(1) == labels
    assert right.float().mean().item() == pytest.approx(metrics["student.accuracy"])

    told = report["details"]["continual"]
    confusion = torch.tensor(told["confusion"])
    assert confusion.sum() == len(held_out)
    assert confusion.diagonal().sum() / len(held_out) == pytest.approx(metrics["student.accuracy"])
    assert set(told["per_class_accuracy"]) == set("0123456789")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Confusion after the last step" in page
    for step in ("1", "2"):
        with Image.open(tmp_path / "run" / "steps" / step / "dreams.png") as picture:
            assert min(picture.size) > 200
    between = dreamkit.load_student(tmp_path / "run" / "steps" / "1" / "student")
    assert between.card.num_classes == 8


@pytest.mark.parametrize(
    "preset", ["finetune", "lwf_mc", "deepdream", "adaptive", "oracle_distill", "oracle_classify"]
)
def test_what_it_is_compared_with(tmp_path, invoke, preset):
    code, _, err = invoke("run", RECIPE, "--preset", f"smoke+{preset}", "--out", tmp_path / "run")
    assert code == 0, err
    assert "student.combined" in report_of(tmp_path / "run")["metrics"]
    dreams = list((tmp_path / "run" / "steps").glob("*/dreams"))
    assert len(dreams) == (2 if preset in {"deepdream", "adaptive"} else 0)


@pytest.mark.slow
def test_old_digits_are_kept_and_forgotten_without_them(tmp_path, invoke):
    combined = {}
    for preset in (None, "finetune", "lwf_mc", "oracle_distill"):
        chosen = () if preset is None else ("--preset", preset)
        folder = tmp_path / str(preset)
        assert invoke("run", RECIPE, *chosen, "--out", folder)[0] == 0
        combined[preset] = report_of(folder)["metrics"]["student.combined"]
    assert combined["finetune"] < 0.6 < combined[None]
    assert combined["finetune"] < combined["lwf_mc"] < combined[None]
    assert combined[None] >= 0.95 * combined["oracle_distill"]


# --- what is interrupted ----------------------------------------------------------------------


def states(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("model.safetensors")
    }


@pytest.mark.parametrize(
    ("where", "adaptive"),
    [
        pytest.param("between steps", False, marks=pytest.mark.slow),
        ("first training", True),
        pytest.param("second training", True, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_the_same(
    tmp_path, recipe, recipe_file, invoke, monkeypatch, where, adaptive
):
    if adaptive:
        recipe["synthesis"]["batch_size"] = 8
        recipe["synthesis"]["regularizers"] = {"bn_feature": 30, "js_compete": 1}
        recipe["application"]["adaptive"] = {"every": 1}
    file = recipe_file(recipe)
    code, _, err = invoke("run", file, "--out", tmp_path / "whole")
    assert code == 0, err
    monkeypatch.setattr(training_run, "CHECKPOINT_SECONDS", 0.0)
    calls = {"n": 0}
    real_step, real_save = Trainer.step, continual.write_artifact

    def step(self, *batches, share):
        calls["n"] += 1
        if calls["n"] == {"first training": 3, "second training": 7}.get(where):
            raise KeyboardInterrupt
        return real_step(self, *batches, share=share)

    def save(*arguments):
        real_save(*arguments)
        if where == "between steps":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        patched.setattr(continual, "write_artifact", save)
        assert invoke("run", file, "--out", tmp_path / "parts")[0] == 130
    code, out, err = invoke("run", file, "--out", tmp_path / "parts", "--resume")
    assert code == 0, err
    if where != "first training":
        assert "learnt already" in out + err
    assert states(tmp_path / "parts") == states(tmp_path / "whole")
    whole, parts = (report_of(tmp_path / name)["metrics"] for name in ("whole", "parts"))
    same = [name for name in whole if "accuracy" in name or "combined" in name]
    assert same
    for name in same:
        assert parts[name] == whole[name], name


def test_without_images_of_the_old_classes(tmp_path, recipe, recipe_file, invoke):
    recipe["evaluation"] = None
    code, out, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run")
    assert code == 0, err
    assert "no test images of 'base'" in out
    metrics = report_of(tmp_path / "run")["metrics"]
    assert "step1.seven.accuracy" in metrics
    assert "step2.forgetting" in metrics
    assert "student.combined" not in metrics
    assert "teacher.accuracy" not in metrics


def test_a_name_that_means_another_thing(tmp_path, recipe, recipe_file, invoke):
    for split in ("train", "test"):
        for number in range(2):
            Image.new("L", (8, 8), 9).save(made(tmp_path / split / "3") / f"{number}.png")
    folder = {"source": "folder", "path": str(tmp_path / "train")}
    test = {"source": "folder", "path": str(tmp_path / "test")}
    recipe["application"]["sets"] = [{"train": folder, "test": test, "prefix": "Roman "}]
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run")
    assert code == 0, err
    student = dreamkit.load_student(tmp_path / "run" / "student")
    assert student.card.class_names == (*"0123456", "Roman 3")


def made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_cost_of_all_sets_is_estimated(tmp_path, recipe, recipe_file, invoke):
    code, out, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run", "--dry-run")
    assert code == 0, err
    assert f"dreaming {4 * 7 + 4 * 8} images" in out
    assert not (tmp_path / "run").exists()


def test_what_is_made_of_a_network_is_bound_to_it(tmp_path, recipe, recipe_file, invoke):
    assert invoke("run", recipe_file(recipe), "--out", tmp_path / "run")[0] == 0
    settings = DreamStore(tmp_path / "run" / "steps" / "2" / "dreams").settings
    model = dreamkit.load_student(tmp_path / "run" / "steps" / "1" / "student")
    assert settings["teacher_sha256"] == hash_weights(model)


# --- bad input --------------------------------------------------------------------------------


def refused(invoke, file, tmp_path):
    code, _, err = invoke("run", file, "--out", tmp_path / "run")
    assert code == 2
    assert "Traceback" not in err
    assert not list(tmp_path.glob("run/steps")), "it dreamed or trained before it refused"
    return " ".join(err.split())


def test_classes_that_are_old_already(tmp_path, recipe, recipe_file, invoke):
    del recipe["application"]["sets"][1]["test"]
    recipe["application"]["sets"][1]["train"]["classes"] = [6, 8]
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert "application.sets[1].train: '6' is an old class already" in err
    recipe["application"]["sets"][1]["train"]["classes"] = [7, 8]
    assert "'7' is an old class already" in refused(invoke, recipe_file(recipe), tmp_path)


def test_an_empty_class_folder(tmp_path, recipe, recipe_file, invoke):
    (tmp_path / "new" / "seven").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "new" / "seven" / "0.png")
    (tmp_path / "new" / "empty").mkdir()
    train = {"source": "folder", "path": str(tmp_path / "new")}
    recipe["application"]["sets"] = [{"train": train}]
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert "application.sets[0].train" in err
    assert "empty" in err


def test_images_of_another_size(tmp_path, recipe, recipe_file, invoke):
    recipe["teacher"] = {"source": "cifar", "model": "resnet20", "num_classes": 7}
    recipe["evaluation"] = None
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert "application.sets[0].train" in err
    assert "digits are (1, 8, 8)" in err


def test_dreams_of_another_size_as_replay(tmp_path, recipe, recipe_file, invoke, tiny):
    tiny["teacher"] = {
        "source": "cifar",
        "model": "resnet20",
        "input_size": [1, 16, 16],
        "mean": [0.5],
        "std": [0.5],
    }
    assert invoke("run", recipe_file(tiny, "tiny.yaml"), "--out", tmp_path / "other")[0] == 0
    replay = {"source": "dreams", "path": str(tmp_path / "other"), "allow_foreign": True}
    recipe["application"]["replay"] = replay
    recipe["synthesis"] = None
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert "application.replay: its images are (1, 16, 16)" in err


def test_a_head_of_an_unknown_kind(tmp_path, recipe, recipe_file, invoke):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())\n"
        "    return nn.Sequential(body, nn.Linear(144, 7), nn.BatchNorm1d(7))\n"
    )
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(144, 7), nn.BatchNorm1d(7))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    recipe["teacher"] = {
        "source": "checkpoint",
        "builder": f"{tmp_path / 'net.py'}:net",
        "path": str(tmp_path / "net.pth"),
        "num_classes": 7,
        "input_size": [1, 8, 8],
        "mean": [0.3],
        "std": [0.4],
    }
    assert "unknown kind" in refused(invoke, recipe_file(recipe), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay": None}, "'replay_distillation' needs images of old classes"),
        ({"losses": [{"name": "cross_entropy"}]}, "no loss looks at images of old classes"),
        ({"losses": []}, "at least one loss"),
        ({"sets": []}, "at least one set"),
        ({"sets": [{}]}, "the option 'train' is missing"),
        ({"sets": [{"train": {"source": "digits"}, "name": "a b"}]}, "use letters, digits"),
        ({"sets": [{"train": {"source": "digits"}, "name": "base"}]}, "as the teacher's classes"),
        ({"sets": [{"train": {"source": "digits"}, "test": 3}]}, "should be a mapping"),
        ({"sets": [{"train": {"source": "digits"}, "trian": 3}]}, "unknown option"),
        ({"replay": {"source": "digits"}, "adaptive": {"every": 2}}, "'replay' must be dreams"),
        ({"training": {"statistics": "recalibrate"}}, "would undo what freeze_bn keeps"),
        ({"training": {"augmentation": {"mixup": 1}}}, "classes are learnt from whole images"),
    ],
)
def test_options_that_do_not_go_together(recipe, recipe_file, invoke, change, message):
    recipe["application"] |= change
    code, _, err = invoke("validate", recipe_file(recipe))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_test_set_of_other_classes(tmp_path, recipe, recipe_file, invoke):
    recipe["application"]["sets"][1]["test"]["classes"] = [6, 7]
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert "application.sets[1].test: '6' is none of the classes learnt: 8, 9" in err


@pytest.mark.parametrize(("batch_size", "batches"), [(2, 14), (None, 2)])
def test_a_set_too_short_for_its_dreams(tmp_path, recipe, recipe_file, invoke, batch_size, batches):
    recipe["synthesis"]["batch_size"] = batch_size
    if batch_size is None:  # 64: the second set's are two, and are refused before the first's
        recipe["application"]["images_per_class"] = 9
    recipe["synthesis"]["regularizers"] = {"bn_feature": 30, "js_compete": 1}
    recipe["application"]["adaptive"] = {"every": 50}
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert f"application.training: the last of {batches} batches of dreams would come before" in err
    recipe["synthesis"] = [recipe["synthesis"], recipe["synthesis"]]
    err = refused(invoke, recipe_file(recipe), tmp_path)
    assert f"application.training: the last of {batches} batches of dreams would come before" in err


@pytest.mark.parametrize("dry", [True, False])
def test_dreams_of_some_of_the_old_classes_alone(tmp_path, recipe, recipe_file, invoke, dry):
    recipe["synthesis"]["labels"] = [0, 1, 2, 3, 4, 5, 6]  # of seven classes; an eighth is learnt
    flags = ("--dry-run",) if dry else ()
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run", *flags)
    assert code == 2
    assert "'labels' leave out class 7, which is old when 'eight_nine' is learnt" in err
    recipe["synthesis"]["labels"] = [0, 1]
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run", *flags)
    assert code == 2
    assert "leave out class 2, which is old when 'seven'" in err
    recipe["synthesis"] = [recipe["synthesis"], {**recipe["synthesis"], "labels": [2, 3, 4, 5]}]
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run", *flags)
    assert code == 2
    assert "leave out class 6, which is old when 'seven'" in err
    assert not (tmp_path / "run" / "dreams").exists()


def test_a_source_without_classes(tmp_path, recipe, recipe_file, invoke, tiny):
    assert invoke("run", recipe_file(tiny, "tiny.yaml"), "--out", tmp_path / "other")[0] == 0
    bad = copy.deepcopy(recipe)
    bad["application"]["sets"] = [{"train": {"source": "dreams", "path": str(tmp_path / "other")}}]
    assert "no classes of their own" in refused(invoke, recipe_file(bad), tmp_path)
