"""INT8 from the recipe and from Python, to a file that runs by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamkit
from dreamkit.api.quantize import quantize
from dreamkit.errors import DreamkitError
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.store.artifact import write_artifact

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed, reason="needs the extra onnx")

QUICK = {"progress": False, "device": "cpu", "latency_batches": ()}
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "quantize.md"
BLOCKED = """
import sys
for name in ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "dreamkit"):
    sys.modules[name] = None  # importing it fails
"""


@pytest.fixture(scope="module")
def digits():
    return dreamkit.load_teacher("bundled:digits_resnet8")


@pytest.fixture(scope="module")
def dreams(digits):
    return dreamkit.invert(digits, 64, steps=20, progress=False, device="cpu")


@pytest.fixture(scope="module")
def made(digits, dreams):
    before = {name: value.clone() for name, value in digits.model.state_dict().items()}
    draws = torch.get_rng_state()
    found = quantize(digits, dreams, evaluation=(dreams.images, dreams.labels), **QUICK)
    assert torch.equal(torch.get_rng_state(), draws)
    assert not digits.model.training
    for name, value in digits.model.state_dict().items():
        assert torch.equal(value, before[name])
    return found


def test_a_network_in_memory_becomes_a_file_that_agrees_with_it(made, digits, dreams):
    images = digits.card.normalise(dreams.images)
    right = digits.model(images).argmax(1)
    assert float((made.load(1)(images).argmax(1) == right).float().mean()) >= 0.97
    assert made.metrics["int8.agreement"] >= 0.9
    assert made.metrics["float.bytes"] > 2 * made.metrics["int8.bytes"] == 2 * len(made.file)
    assert made.metrics["teacher.accuracy"] == pytest.approx(
        float((right == dreams.labels).float().mean())
    )
    assert set(made.noise) == set(made.about["noise_db"])
    assert "agreement, unseen images" in repr(made)


@pytest.fixture(scope="module")
def small(digits, dreams):
    return quantize(digits, dreams, weights="int4", **QUICK)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_it_runs_with_onnxruntime_and_numpy_alone(weights, made, small, digits, dreams, tmp_path):
    """By the lines of the how-to page, which compare with the labels themselves."""
    made = {"int8": made, "int4": small}[weights]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [block for block in blocks if "onnxruntime.InferenceSession" in block]
    made.save(tmp_path / "quantized")
    labels = made.load()(digits.card.normalise(dreams.images)).argmax(1)
    np.save(tmp_path / "pixels.npy", dreams.images.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    lines = lines.replace("model.int8", f"model.{weights}")
    code = BLOCKED + lines + "print(logits.argmax(1).tolist())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == labels.tolist()
    told = json.loads((tmp_path / "quantized" / f"model.{weights}.json").read_text())
    assert told["quantization"]["backend"] == "onnxruntime"
    assert told["quantization"]["target"] == "portable"
    assert told["quantization"]["input"] == "images"


def test_its_recipe_says_what_was_done(made):
    recipe = made.to_recipe()
    assert "name: quantize" in recipe
    assert "name: onnxruntime" in recipe


def test_what_is_trained_in_integers_agrees_with_float(digits, dreams):
    options = {**QUICK, "target": "portable", "equalise": True, "calibration_images": 16}
    before = {name: value.clone() for name, value in digits.model.state_dict().items()}
    found = quantize(digits, dreams, training={"steps": 20, "lr": 1e-3, "ema": 0.5}, **options)
    for name, value in digits.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert found.metrics["int8.agreement"] >= 0.97
    assert found.metrics["training.steps"] == 20
    told = found.about["quantization"]
    assert (told["trained"], told["equalise"]) == ("LSQ", True)
    assert "steps: 20" in found.to_recipe()


def test_training_makes_up_for_weights_of_4_bits(small, digits, dreams):
    assert small.file_name == "model.int4.onnx"
    options = {"training": {"steps": 40, "lr": 1e-3}, **QUICK}
    trained = quantize(digits, dreams, weights="int4", **options)
    assert trained.metrics["int8.logits_snr_db"] > small.metrics["int8.logits_snr_db"] + 1
    assert "weights: int4" in trained.to_recipe()
    assert len(trained.file) == pytest.approx(len(small.file), rel=0.01)


def test_a_students_folder_does_as_the_model(digits, dreams, tmp_path):
    write_artifact(tmp_path / "run" / "student", digits.model, digits.card, digits.builder, {})
    found = quantize(tmp_path / "run", dreams, out=tmp_path / "out", allow_foreign=True, **QUICK)
    assert (tmp_path / "out" / "quantized" / "model.int8.onnx").read_bytes() == found.file


def test_a_student_that_is_made_first_is_handed_back(digits, dreams, tmp_path):
    after = {
        "name": "prune",
        "criteria": [{"name": "magnitude", "weight": 1}],
        "target": {"flops": 0.7},
        "recovery": {"epochs": 0},
    }
    found = quantize(digits, dreams, after=after, **QUICK)
    student = found.student
    assert sum(p.numel() for p in student.model.parameters()) < sum(
        p.numel() for p in digits.model.parameters()
    )
    images = student.card.normalise(dreams.images[:8])
    assert float((found.load(1)(images) - student.model(images)).detach().abs().max()) < 1
    again = dreamkit.load_student(student.save(tmp_path / "student"))
    assert torch.equal(again(images), student.model(images))
    assert quantize(digits, dreams, **QUICK).student is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "avx"}, "target: .*'portable', 'vnni', 'arm'"),
        ({"ranges": "entropy"}, "ranges"),
        ({"weights": "int2"}, "weights: .*'int8' or 'int4'"),
        ({"weights": "int4", "target": "tensorrt"}, "weights: set it to int8"),
        ({"quantizer": "openvino"}, "no name 'openvino' among the quantizers"),
        ({"quantizer": OnnxQuantizer(), "target": "arm"}, "^target: leave it out"),
        ({"keep_float": ["layer9*"]}, r"^keep_float: no layer 'layer9\*'"),
        ({"calibration_images": 0}, "calibration_images"),
        ({"equalise": "yes"}, "equalise"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"precision": "bfloat16"}}, "training.precision"),
        ({"training": {"features": 1}}, "training.features: set it to 0"),
        ({"max_disagreement": 2}, "max_disagreement"),
    ],
)
def test_what_cannot_be_is_one_message(digits, dreams, options, message):
    with pytest.raises(DreamkitError, match=message):
        quantize(digits, dreams, **{**QUICK, **options})


def test_images_of_another_size_are_refused(digits):
    with pytest.raises(DreamkitError, match="images"):
        quantize(digits, torch.zeros(40, 1, 9, 9, dtype=torch.uint8), **QUICK)


def test_without_the_extra_it_is_named(digits, dreams, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DreamkitError, match=r'pip install "dreamkit\[onnx\]"'):
        quantize(digits, dreams, out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out" / "quantized").exists()


def test_the_bundled_recipe(invoke, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra demo")
    run = tmp_path / "run"
    code, out, _ = invoke("run", "digits/quantize", "--preset", "smoke", "--out", run)
    assert code == 0
    assert "The layers that integers make most noise of" in out
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["int8.accuracy"] > 0.95 * report["metrics"]["teacher.accuracy"]
    assert "In integers" in (run / "report.html").read_text()
    assert invoke("verify", run).code == 0
    file: Path = run / "quantized" / "model.int8.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = invoke("verify", run)
    assert code == 1
    assert "not what its JSON tells" in out


def test_pruned_and_in_integers_in_one_run(invoke, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra demo")
    run = tmp_path / "run"
    small = ("synthesis.images=64", "synthesis.batch_size=64", "synthesis.stages=[{steps: 20}]")
    small += ("application.after.recovery={steps: 40, batch_size: 32}",)
    small += ("application.latency_batches=[1]", "application.max_disagreement=1")
    changes = [word for change in small for word in ("--set", change)]
    code, out, err = invoke("run", "digits/quantize", "--preset", "pruned", *changes, "--out", run)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    metrics = report["metrics"]
    assert {f"{name}.accuracy" for name in ("teacher", "pruned", "student", "int8")} <= set(metrics)
    assert metrics["student.flops"] <= 0.5 * metrics["teacher.flops"]
    assert metrics["int8.accuracy_ratio"] == metrics["int8.accuracy"] / metrics["teacher.accuracy"]
    assert "student, int8" in out
    told = json.loads((run / "quantized" / "model.int8.json").read_text())
    assert told["card"]["origin"] == "pruned from bundled/digits_resnet8"
    student = dreamkit.load_student(run)
    images = student.card.normalise(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    file = run / "quantized" / "model.int8.onnx"
    difference = OnnxQuantizer().load(file, 1)(images) - student(images)
    assert float(difference.detach().abs().max()) < 1
    assert invoke("verify", run).code == 0
