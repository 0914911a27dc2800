"""Recipes run whole, through the command line."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

import dreamkit
from dreamkit.applications.continual import Continual
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.flat_state import hash_state
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.sources.digits import Digits
from dreamkit.store.artifact import read_artifact
from dreamkit.synthesizers.deepinversion import DeepInversion, Inversion

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
FLAGSHIP = ROOT / "recipes" / "prune_resnet50_ha.yaml"
CONTRACT = {
    *(f"{model}.accuracy" for model in ("teacher", "pruned", "student")),
    *(f"{m}.{k}" for m in ("teacher", "student") for k in ("params", "flops", "latency_ms")),
    *(f"synthesis.{k}" for k in ("images", "seconds", "images_per_second", "statistics_distance")),
    "training.seconds",
}
SMALL = ("--set", "synthesis.images=40", "--set", "synthesis.batch_size=16")
SMALL += ("--set", "synthesis.stages=[{steps: 5}]", "--set", "application.recovery.epochs=1")

FRESH_PROCESS = """
import pickle, sys
def refuse(*args, **kwargs): raise AssertionError("pickle")
pickle.load = pickle.loads = pickle.Unpickler = refuse
import dreamkit, torch, safetensors.torch
model = dreamkit.load_student(sys.argv[1])
x = safetensors.torch.load_file(sys.argv[2])["x"]
with torch.no_grad():
    safetensors.torch.save_file({"y": model(x)}, sys.argv[3])
"""


def metrics_of(folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((folder / "report.json").read_text())["metrics"]
    return metrics


def content(path):
    """Return the SHA-256 of a file's tensors; the header of dreams tells how long they took."""
    return hash_state(safetensors.torch.load_file(path))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([], marks=pytest.mark.slow, id="whole"),
        pytest.param(["synthesis.images=512", "application.recovery.epochs=25"], id="in a hurry"),
    ],
)
def test_the_quickstart(tmp_path, invoke, changes):
    pytest.importorskip("sklearn", reason="the quickstart is judged on scikit-learn's digits")
    start = time.perf_counter()
    options = [word for change in changes for word in ("--set", change)]
    code, out, _ = invoke("run", str(QUICKSTART), *options, "--out", str(tmp_path / "run"))
    seconds = time.perf_counter() - start
    folder = tmp_path / "run"
    assert code == 0
    assert "teacher" in out
    assert "student" in out
    assert seconds < 150

    metrics = metrics_of(folder)
    assert metrics.keys() >= CONTRACT
    assert metrics["synthesis.images"] >= 512
    assert metrics["teacher.accuracy"] >= 0.97
    assert metrics["pruned.accuracy"] < metrics["student.accuracy"]
    assert metrics["student.accuracy"] >= 0.98 * metrics["teacher.accuracy"]
    assert metrics["student.flops"] <= 0.5 * metrics["teacher.flops"]
    assert metrics["student.params"] < metrics["teacher.params"]

    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert page.count("<svg") >= 3  # synthesis, pruning, recovery
    assert "deepinversion" in page
    with Image.open(folder / "dreams.png") as picture:
        assert min(picture.size) > 300

    student = dreamkit.load_student(folder / "student")
    card = read_artifact(folder / "student").card
    assert student.card == card
    held_out = Digits("test").open(card)
    measured = accuracy(student, held_out, card, torch.device("cpu"))
    assert measured == pytest.approx(metrics["student.accuracy"])
    x = card.normalise(held_out.batch(range(8))[0])
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    files = [folder / "student", tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, files)], check=True)
    with torch.no_grad():
        assert torch.equal(safetensors.torch.load_file(files[2])["y"], student(x))


def test_a_finished_run_is_left_as_it_is(tmp_path, invoke):
    command = ("run", str(QUICKSTART), *SMALL, "--out", str(tmp_path / "run"))
    assert invoke(*command)[0] == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}
    code, out, _ = invoke(*command)
    assert code == 0
    assert "already holds this recipe's finished run" in out
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")} == before


def test_an_interrupted_run_goes_on_to_the_same_dreams(tmp_path, invoke, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert invoke("run", str(QUICKSTART), *SMALL, "--out", str(whole))[0] == 0

    dreamed: list[int] = []
    original = Inversion.dream

    def interrupted(self, plan, on_step):
        if plan.index == 1 and not dreamed.count(1):
            dreamed.append(1)
            raise KeyboardInterrupt
        dreamed.append(plan.index)
        return original(self, plan, on_step)

    monkeypatch.setattr(Inversion, "dream", interrupted)
    command = ("run", str(QUICKSTART), *SMALL, "--out", str(parts))
    code, _, err = invoke(*command)
    assert code == 130
    assert "what was finished is kept; go on with\n  dreamkit run " in err
    code, out, _ = invoke(*command, "--resume")
    assert code == 0
    assert "1 of 3 batches kept" in out
    assert dreamed == [0, 1, 1, 2]  # batch 0 once; batch 1 was in hand when it was interrupted
    for shard in sorted((whole / "dreams").glob("*.safetensors")):
        assert content(parts / "dreams" / shard.name) == content(shard)


def test_distillation_and_later_runs_on_its_dreams(tmp_path, invoke):
    recipe = str(ROOT / "recipes" / "digits" / "distill.yaml")
    first, second = tmp_path / "first", tmp_path / "second"
    assert invoke("run", recipe, "--preset", "smoke", "--out", str(first))[0] == 0
    assert metrics_of(first)["student.params"] < metrics_of(first)["teacher.params"]
    again = f"application.images={{source: dreams, path: {first}}}"
    options = ("--preset", "smoke", "--set", again, "--set", "synthesis=null", "--out", str(second))
    assert invoke("run", recipe, *options)[0] == 0
    assert not (second / "dreams").exists()
    assert metrics_of(second)["student.agreement"] == metrics_of(first)["student.agreement"]


def test_dreams_are_judged_by_other_networks(tmp_path, invoke, tiny, recipe_file):
    pytest.importorskip("sklearn", reason="the reference is scikit-learn's digits")
    verifier = {
        "source": "checkpoint",
        "builder": "dreamkit.teachers.small_resnet:SmallResNet",
        "arguments": {"depth": 8, "num_classes": 10, "in_channels": 1, "width": 4},
        "input_size": [1, 12, 12],  # other than the teacher's
        "mean": [0.3],
        "std": [0.4],
        "num_classes": 10,
    }
    tiny["synthesis"] |= {"images": 24, "batch_size": 24, "stages": [{"steps": 3}]}
    tiny["application"] = {"name": "judge", "verifiers": [verifier, verifier], "splits": 4}
    tiny["application"]["reference"] = {"source": "digits"}
    first, second = tmp_path / "first", tmp_path / "second"
    recipe = str(recipe_file(tiny))
    code, out, _ = invoke("run", recipe, "--out", str(first))
    assert code == 0
    assert "the Fréchet distance is biased upwards" not in out  # 24 images, 16 features
    assert "classifier score, 4 splits" in out
    metrics = metrics_of(first)
    assert metrics["judge.images"] == 24
    for name in ("SmallResNet", "SmallResNet_2"):
        name = f"judge.checkpoint/dreamkit_teachers_small_resnet_{name}"
        assert 0 <= metrics[f"{name}.accuracy"] <= 1
        assert 1 <= metrics[f"{name}.classifier_score"] <= 6  # a split has six images
        assert metrics[f"{name}.frechet_distance"] > 0
    page = (first / "report.html").read_text()
    assert "Fréchet distance to 540 real images" in page
    assert " at fc</td>" in page

    # The same dreams from the store, without dreaming, are judged the same.
    again = f"application.images={{source: dreams, path: {first}}}"
    options = ("--set", again, "--set", "synthesis=null", "--out", str(second))
    assert invoke("run", recipe, *options)[0] == 0
    for name, value in metrics_of(second).items():
        assert value == pytest.approx(metrics[name]), name

    itself = "application.verifiers=[{source: bundled, model: digits_resnet8}]"
    code, _, err = invoke("run", recipe, "--set", itself, "--out", str(tmp_path / "third"))
    assert code == 2
    assert "application.verifiers[0]: bundled/digits_resnet8 is the inverted teacher itself" in err
    assert not (tmp_path / "third").exists()


def test_dreams_are_exported_as_an_image_folder(tmp_path, invoke):
    run, images = tmp_path / "run", tmp_path / "images"
    options = ("--preset", "smoke", "--set", "application={name: synthesize}", "--out", str(run))
    assert invoke("run", str(QUICKSTART), *options)[0] == 0
    code, out, _ = invoke("export-dreams", str(run), str(images))
    assert code == 0
    assert "64 images" in out
    found = ImageFolder(str(images))
    assert len(found) == 64
    assert found.classes == [f"{digit}_{digit}" for digit in range(10)]
    code, _, err = invoke("export-dreams", str(run), str(images))
    assert code == 2
    assert "not empty" in err


@pytest.mark.slow
def test_the_flagships_mechanics_at_a_small_size(tmp_path, invoke):
    overrides = ["teacher.weights=null", "teacher.input_size=[3, 64, 64]", "synthesis.images=4"]
    overrides += ["synthesis.stages=[{size: 32, steps: 2}, {size: 64, steps: 1}]"]
    overrides += ["synthesis.batch_size=4", "application.batch_size=4", "application.step=0.3"]
    overrides += ["latency={name: torch-cpu, warmup: 0, repeats: 3}"]
    overrides += ["application.recovery.augmentation.size=32"]
    options = [word for override in overrides for word in ("--set", override)]
    out_folder = tmp_path / "run"
    code, out, _ = invoke(
        "run", str(FLAGSHIP), "--preset", "smoke", *options, "--out", str(out_folder)
    )
    assert code == 0
    assert "random: this run shows the mechanics only" in " ".join(out.split())
    metrics = metrics_of(out_folder)
    assert metrics["student.flops"] <= 0.63 * metrics["teacher.flops"]
    assert (out_folder / "latency_lut.json").is_file()
    model = dreamkit.load_student(out_folder / "student")
    assert sum(p.numel() for p in model.parameters()) == metrics["student.params"]


@pytest.mark.slow
def test_the_flagships_smoke_preset_whole(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "-m", "dreamkit", "run", str(FLAGSHIP), "--preset", "smoke"]
    command += ["--set", "teacher.weights=null", "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert time.perf_counter() - start < 300
    metrics = metrics_of(tmp_path / "run")
    assert metrics["student.flops"] <= 0.63 * metrics["teacher.flops"]


RANDOM: dict[str, list[str]] = {"cifar10": []}
"""Changes that leave out weights which are not here, where a folder's recipes need others."""


CONTINUAL = {"imagenet": (1000, 200, 30), "cifar10": (6, 2, 5000), "digits": (7, 1, 125)}
"""Of the first set: classes before, new ones, images of each."""


def without_data(path: Path, preset: str | None = None) -> list[str]:
    """Return what makes a recipe complete on a machine without its data sets."""
    changes = ["evaluation=null"]
    if path.parent.name == "cifar100":
        changes.append("teacher.weights=null")
    if path.stem.startswith("continual") and path.parent.name != "digits":
        changes += ["application.sets=[{train: {source: digits}}]", "teacher.weights=null"]
        if preset is not None and "oracle" in preset:
            changes.append("application.replay={source: digits}")
    return changes


def test_paper_presets_optimise_pixels_to_the_last_step() -> None:
    # They name images and weights that need not be here, so the recipe is built without.
    checked = []
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        if "\n  paper:" not in path.read_text("utf-8"):
            continue
        without = [*without_data(path), *RANDOM.get(path.parent.name, ["teacher.weights=null"])]
        synthesis = read_recipe(path, build_registries, "paper", without).recipe.synthesis
        if isinstance(synthesis, DeepInversion):
            assert isinstance(synthesis.parameterisation, Pixels)
            assert synthesis.patience is None
            checked.append(path.name)
    assert {"prune_resnet50_ha.yaml", "adaptive.yaml", "transfer_resnet50.yaml"} <= {*checked}


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "recipes").rglob("*.yaml")), ROOT / "benchmarks" / "pruning_tables.yaml"],
    ids=lambda p: p.stem,
)
def test_adaptive_presets_train_long_enough_for_all_their_dreams(path) -> None:
    presets = yaml.safe_load(path.read_text(encoding="utf-8")).get("presets") or {}
    several = []
    if path.stem.startswith("continual"):
        several = [
            f"{budget}+adaptive" for budget in ("smoke", "draft", "paper") if budget in presets
        ]
    for preset in (None, *presets, *several):
        recipe = read_recipe(path, build_registries, preset, without_data(path, preset)).recipe
        application = recipe.application
        if getattr(application, "adaptive", None) is None:
            continue
        options = getattr(application, "recovery", None) or application.training
        images = recipe.synthesis.images
        steps = options.total_steps(images)
        if isinstance(application, Continual):  # its smallest sets: CUB's, CIFAR-10's, the digit 7
            base, new, count = CONTINUAL[path.parent.name]
            images = application.images_per_class * base
            steps = options.total_steps(count * new)
        batches = math.ceil(images / recipe.synthesis.batch_size)
        rhythm = application.adaptive.rhythm(batches, steps)
        assert rhythm * (math.ceil(batches / application.adaptive.batches) - 1) < steps, preset


FEW = {
    "adaptive": ("synthesis.stages=[{steps: 2}]", "synthesis.batch_size=16"),
    "dafl": ("synthesis.steps=2", "synthesis.batch_size=16"),
    "fast_meta": ("synthesis.steps=2", "synthesis.batch_size=16", "synthesis.warmup=1"),
    "cmi": ("synthesis.steps=2", "synthesis.batch_size=16"),
    "nayer": ("synthesis.steps=2", "synthesis.batch_size=16", "synthesis.warmup=1"),
}


@pytest.mark.parametrize("preset", FEW)
def test_a_student_and_its_dreams_grow_together(tmp_path, invoke, preset):
    pytest.importorskip("sklearn", reason="the recipe is judged on scikit-learn's digits")
    changes = [*FEW[preset], "synthesis.images=48", "application.adaptive.every=2"]
    changes += ["application.training={steps: 6, batch_size: 16, precision: float32}"]
    command = ["run", str(ROOT / "recipes" / "digits" / "distill.yaml"), "--preset", preset]
    for change in changes:
        command += ["--set", change]
    folder = tmp_path / "run"
    code, _, err = invoke(*command, "--out", str(folder))
    assert code == 0, err
    metrics = metrics_of(folder)
    assert metrics["synthesis.images"] == 48
    assert metrics["training.steps"] == 6
    assert 0 <= metrics["student.accuracy"] <= 1
    assert not (folder / "checkpoints").exists()
    assert dreamkit.load_student(folder / "student", allow_builder=True).card.num_classes == 10


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_hundred_classes_are_taught_from_a_folder(tmp_path, invoke, device):
    for number in range(100):
        folder = tmp_path / "images" / f"class_{number:02}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (2 * number, 9, 99)).save(folder / "0.png")
    evaluation = json.dumps({"source": "folder", "path": str(tmp_path / "images")})
    command = ["run", str(ROOT / "recipes" / "cifar100" / "distill.yaml")]
    command += ["--preset", "wrn_40_2_wrn_16_1+smoke", "--set", f"evaluation={evaluation}"]
    command += ["--set", f"device={device}", "--set", "synthesis.steps=2"]
    code, _, err = invoke(*command, "--out", str(tmp_path / "run"))
    assert code == 0, err
    metrics = metrics_of(tmp_path / "run")
    assert metrics["synthesis.images"] == 32
    assert 0 <= metrics["student.accuracy"] <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "recipes" / "cifar10").iterdir()))
def test_every_cifar_recipes_smoke_preset_whole(tmp_path, invoke, name, device):
    command = ["run", str(ROOT / "recipes" / "cifar10" / f"{name}.yaml"), "--preset", "smoke"]
    command += ["--set", f"device={device}"]
    images = 32
    if name == "continual":  # it learns from real images
        sets = [["frog", "horse"], ["ship", "truck"]]
        for label in itertools.chain(*sets):
            (tmp_path / "data" / label).mkdir(parents=True)
            for number in range(16):
                picture = Image.new("RGB", (32, 32), (16 * number, len(label), 9))
                picture.save(tmp_path / "data" / label / f"{number}.png")
        trained = [
            {"train": {"source": "folder", "path": str(tmp_path / "data"), "classes": classes}}
            for classes in sets
        ]
        command += ["--set", f"application.sets={json.dumps(trained)}", "--set", "evaluation=null"]
        command += ["--set", "teacher.weights=null", "--set", "teacher.num_classes=6"]
        images = 3 * 6 + 3 * 8
    code, _, err = invoke(*command, "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert metrics_of(tmp_path / "run")["synthesis.images"] == images


OFTEN = """
import sys
from dreamkit.stages import training_run
from dreamkit.cli import main
training_run.CHECKPOINT_SECONDS = 0.2
sys.argv = ["dreamkit", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_an_adaptive_run_killed_hard_ends_like_an_undisturbed_one(tmp_path):
    pytest.importorskip("sklearn", reason="the recipe is judged on scikit-learn's digits")
    recipe = str(ROOT / "recipes" / "digits" / "distill.yaml")
    command = [sys.executable, "-c", OFTEN, "run", recipe, "--preset", "adaptive"]
    command += ["--set", "synthesis.stages=[{steps: 60}]", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    kept = parts / "checkpoints" / "training.safetensors"
    killed = 0
    for _ in range(2):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        process = subprocess.Popen(
            [*command, str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            if kept.exists() and kept.stat().st_mtime_ns > before:
                process.kill()
                killed += 1
                break
            time.sleep(0.02)
        process.wait()
    assert killed == 2
    assert not (parts / "report.json").exists()
    subprocess.run([*command, str(parts)], check=True, capture_output=True)
    for file in (
        "student/model.safetensors",
        *(f"dreams/shard-{i:06d}.safetensors" for i in range(8)),
    ):
        assert content(parts / file) == content(whole / file), file


SHRINKING = {
    "prune": {
        "name": "prune",
        "criteria": [{"name": "taylor", "weight": 1}],
        "target": {"channels": 0.9},
        "recovery": {"steps": 6, "batch_size": 8},
        "ranking_batches": 1,
        "statistics_batches": 1,
        "batch_size": 8,
    },
    "recover": {"name": "recover", "sparsity": 0.5, "training": {"steps": 6, "batch_size": 8}},
}


@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("every", [None, 2])
def test_a_network_is_made_smaller_on_its_own_dreams(
    tmp_path, invoke, tiny, recipe_file, name, every
):
    tiny["synthesis"] |= {"images": 24, "batch_size": 8, "stages": [{"steps": 2}]}
    tiny["application"] = dict(SHRINKING[name])
    if every is not None:
        tiny["synthesis"]["regularizers"].append({"name": "js_compete", "weight": 1})
        tiny["application"]["adaptive"] = {"every": every}
    code, _, err = invoke("run", recipe_file(tiny), "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    metrics = metrics_of(tmp_path / "run")
    assert metrics["synthesis.images"] == 24
    assert metrics["training.steps"] == 6
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    pool = [
        (r["step"], r["numbers"]["images"]) for r in log if r["stage"] == "pool" and "step" in r
    ]
    # The first batch came before the training, the others while it went on.
    assert pool == ([] if every is None else [(2, 16), (4, 24)])
    student = dreamkit.load_student(tmp_path / "run" / "student")
    whole = sum(p.numel() for p in student.parameters())
    assert (whole < metrics["teacher.params"]) == (name == "prune")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_pattern_of_zeros_goes_from_the_recipe_into_the_exported_file(
    tmp_path, invoke, tiny, recipe_file
):
    onnx, run = pytest.importorskip("onnx"), tmp_path / "run"
    tiny["application"] = {"name": "recover", "pattern": "2:4", "training": {"steps": 2}}
    code, _, err = invoke("run", recipe_file(tiny), "--out", run)
    assert (code, err) == (0, "")
    metrics = metrics_of(run)
    assert metrics["student.pattern_share"] == 0.9, "all but the first, which sees one channel"
    details = json.loads((run / "report.json").read_text())["details"]["pattern"]
    assert details["left_alone"] == {"conv1": "inputs (1) are no multiple of 4"}
    code, _, err = invoke("export", run)
    assert (code, err) == (0, "")
    (told,) = onnx.load(run / "student" / "model.onnx").metadata_props
    assert json.loads(told.value) == dict.fromkeys(details["weights"], "2:4")
    assert invoke("verify", run).code == 0


def test_adaptive_dreams_that_training_would_not_see_are_refused_before_any(
    tmp_path, invoke, tiny, recipe_file
):
    tiny["synthesis"] |= {"images": 24, "batch_size": 8}
    tiny["synthesis"]["regularizers"].append({"name": "js_compete", "weight": 1})
    tiny["application"] = SHRINKING["recover"] | {"adaptive": {"every": 3}}
    code, _, err = invoke("run", recipe_file(tiny), "--out", tmp_path / "run")
    assert code == 2
    assert "give it 'steps: 7' or more" in err
