"""The application ``quantize``: what it compares, keeps, says and refuses."""

from __future__ import annotations

import hashlib
import json
import time

import pytest
import torch
from torch import nn

from dreamkit.applications.quantize import Quantize
from dreamkit.errors import ArtifactError, DreamkitError
from dreamkit.report.tables import noise_line, quantization_rows
from dreamkit.stages.keeping_float import effects
from dreamkit.stages.quantized_file import check_quantized
from dreamkit.stages.quantizing import (
    calibrated,
    calibration_parts,
    hash_images,
    neighbour_correlation,
)
from dreamkit.types import FileLook, Quantization, Quantizer, StoredImages

LAYERS = ("conv1", "conv2", "fc")


class Shifting(Quantization):
    """Every layer in integers shifts the logits by something of its own."""

    def __init__(self, owner, model):
        self.owner, self.model = owner, model

    layers = LAYERS

    def write(self, path, keep_float=()):
        self.owner.calls.append(tuple(keep_float))
        path.write_text(" ".join(name for name in LAYERS if name not in keep_float))

    def write_float(self, path):
        path.write_text("float")

    def look(self, path, images):
        return FileLook({"conv1": 30.0, "conv2": 5.25, "fc": 10.0}, {"ReduceMean": 1})

    def describe(self):
        return {"backend": "shifting"}


class Shifts(Quantizer):
    """A quantizer in a few lines, whose files are names of layers."""

    suffix = ".int8.txt"

    def __init__(self, shifts=None, saturates=False, wrong=0.0, seconds=None, fails=None):
        self.shifts = shifts or {"conv1": 0.0, "conv2": 0.01, "fc": 0.02}
        self.saturates, self.wrong, self.seconds = saturates, wrong, seconds or {}
        self.fails, self.calls, self.seen = fails, [], []

    def calibrate(self, step):
        if self.fails:
            raise self.fails
        self.seen = [len(batch) for batch in step.batches()]
        self.model = step.model
        return Shifting(self, step.model)

    def load(self, path, threads=None, exact=False):
        names = path.read_text().split()
        shift = sum(self.shifts.get(name, 0.0) for name in names)
        shift += self.wrong if names == ["float"] else 0.0
        turned = self.saturates and not exact and names != ["float"]

        def run(images):
            time.sleep(sum(0.0 if n in names else s for n, s in self.seconds.items()))
            logits = self.model(images).detach() + shift * torch.tensor([1.0, 0.0, -1.0])
            return -logits if turned else logits

        return run


def run(toys, folder, quantizer=None, count=80, evaluation=None, log=None, **options):
    teacher = toys.teacher(toys.two_bn())
    context = toys.context(folder, evaluation=evaluation, log=log)
    options = {"latency_batches": (), **options}
    application = Quantize(quantizer=quantizer or Shifts(), **options)
    before = toys.state(teacher.model)
    outcome = application.run(teacher, toys.images(count), context)
    toys.assert_same_state(teacher.model, before)
    assert outcome.student is None
    return context.log


# The images.


@pytest.mark.parametrize(
    ("images", "asked", "fitted", "compared", "apart"),
    [
        (200, 64, 64, 136, True),
        (80, 64, 40, 40, True),
        (63, 64, 63, 63, False),
        (2000, 64, 64, 512, True),
    ],
)
def test_what_is_compared_on_was_not_calibrated_on(toys, images, asked, fitted, compared, apart):
    parts = calibration_parts(toys.images(images), asked, seed=1)
    assert (len(parts.fitted), len(parts.compared), parts.apart) == (fitted, compared, apart)
    assert apart == (not set(parts.fitted.chosen) & set(parts.compared.chosen))
    assert len(set(parts.fitted.chosen)) == fitted


def test_noise_is_told_from_pictures():
    noise = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert abs(neighbour_correlation(StoredImages(noise.byte(), torch.zeros(8)))) < 0.05
    ramp = torch.arange(32).expand(2, 1, 32, 32).byte()
    assert neighbour_correlation(StoredImages(ramp, torch.zeros(2))) == pytest.approx(1)
    flat = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    assert neighbour_correlation(StoredImages(flat, torch.zeros(2))) == 0


def test_the_hash_is_of_the_pixels_in_order(toys):
    images = toys.images(40)
    right = hashlib.sha256(images.images.numpy().tobytes()).hexdigest()
    assert hash_images(images) == right
    assert hash_images(images.chosen(torch.arange(40).flip(0))) != right


# What is told and kept.


def test_a_file_is_kept_with_what_is_known_of_it(toys, tmp_path):
    evaluation = toys.images(30)
    log = run(toys, tmp_path, evaluation=evaluation, compare=None)
    file, told = tmp_path / "quantized" / "model.int8.txt", tmp_path / "quantized/model.int8.json"
    assert file.read_text() == "conv1 conv2 fc"
    about = json.loads(told.read_text())
    assert about["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert about["quantization"] == {"backend": "shifting"}
    assert about["card"]["mean"] == [0.5, 0.4, 0.3]
    assert about["calibration"]["images"] == 40
    assert list(about["noise_db"]) == ["conv2", "fc", "conv1"]
    metrics = log.metrics
    assert about["metrics"] == {k: v for k, v in metrics.items() if k.startswith(("int8", "float"))}
    assert metrics["int8.accuracy_ratio"] == metrics["int8.accuracy"] / metrics["teacher.accuracy"]
    assert {"int8.agreement", "int8.evaluation_agreement", "int8.logits_snr_db"} <= metrics.keys()
    assert metrics["int8.saturation"] == 0
    assert any("ReduceMean (1)" in note for note in log.notes)
    assert any("calibrated on 40 images, and compared with float on 40" in n for n in log.notes)
    assert log.failures == []
    check_quantized(told)
    file.write_text("conv1")
    with pytest.raises(ArtifactError, match="not what its JSON tells"):
        check_quantized(told)


def test_one_that_disagrees_is_kept_and_the_run_fails_naming_layers(toys, tmp_path):
    log = run(toys, tmp_path, Shifts({"fc": 100.0}), max_disagreement=0.25)
    (failure,) = log.failures
    assert "of 40 images that calibration did not see into different classes" in failure
    assert "conv2 (5.2 dB), fc (10.0 dB), conv1 (30.0 dB)" in failure
    assert (tmp_path / "quantized" / "model.int8.txt").is_file()


def test_saturation_is_reported_as_such_and_is_not_the_files_fault(toys, tmp_path):
    log = run(toys, tmp_path, Shifts({"fc": 0.0}, saturates=True))
    assert log.metrics["int8.saturation"] > 0.5
    assert log.metrics["int8.agreement"] < 0.5
    assert any("saturate on this processor" in note for note in log.notes)
    assert log.failures == []


def test_noise_for_calibration_is_said(toys, tmp_path):
    log = run(toys, tmp_path)  # of pixels in no order
    assert any("look like noise" in note for note in log.notes)


def test_further_images_are_compared_on(toys, tmp_path):
    from dreamkit.api.given_images import GivenImages

    log = run(toys, tmp_path, compare=GivenImages(toys.images(12).images, "compare"))
    assert log.metrics["int8.further_agreement"] == 1.0


def test_times_are_of_both_files_in_turn(toys, tmp_path):
    slow = Shifts(seconds={"float": 0.003})
    log = run(toys, tmp_path, slow, latency_batches=(1, 4))
    rows = log.details["quantization"]["latency"]
    assert {(row["batch_size"], row["threads"]) for row in rows} >= {(1, 1), (4, 1)}
    assert log.metrics["int8.speedup"] < 1.05  # the file in integers is the one that sleeps
    assert any("integers are not faster on this processor" in note for note in log.notes)


def test_few_images_leave_none_to_compare_on(toys, tmp_path):
    log = run(toys, tmp_path, count=20)
    assert any("of 20 images none are left to compare on" in note for note in log.notes)
    assert log.details["quantization"]["compared"] == {"images": 20, "unseen": False}


# Layers in float.


def test_layers_stay_in_float_by_name(toys, tmp_path):
    quantizer = Shifts()
    log = run(toys, tmp_path, quantizer, keep_float=("conv*",))
    assert quantizer.calls == [("conv1", "conv2")]
    assert log.details["quantization"]["kept_float"] == ["conv1", "conv2"]


def test_a_name_that_is_no_layers_is_refused(toys, tmp_path):
    with pytest.raises(DreamkitError, match=r"no layer 'conv3'; did you mean 'conv[12]'") as error:
        run(toys, tmp_path, keep_float=("conv3",))
    assert error.value.path == ("keep_float",)
    assert not (tmp_path / "quantized").exists()


def test_effects_are_shares_of_the_error_by_hand(toys, tmp_path):
    teacher, images = toys.teacher(toys.two_bn()), toys.images(8)
    context = toys.context(tmp_path)
    bench = calibrated(teacher, Shifts(), images, tmp_path, context)
    found = {effect.layer: effect.error for effect in effects(bench, images)}
    # Shifts of 1 and 2 together make 3; without one of them 2 or 1 is left, squared.
    assert found["fc"] == pytest.approx(1 - 1 / 9, abs=1e-3)
    assert found["conv2"] == pytest.approx(1 - 4 / 9, abs=1e-3)
    assert found["conv1"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        ({}, ["fc", "conv2"]),
        ({"conv2": 0.02}, ["fc"]),
        ({"fc": 0.02}, []),
    ],
)
def test_those_of_most_effect_stay_in_float_as_time_allows(toys, tmp_path, seconds, kept):
    # Whatever is measured, some of it is the network's own.
    quantizer = Shifts(seconds={"base": 0.01, **seconds})
    log = run(toys, tmp_path, quantizer, keep_float="auto", float_budget=0.5)
    assert log.details["quantization"]["kept_float"] == kept
    assert list(log.details["quantization_effects"])[:2] == ["fc", "conv2"]


# What cannot be quantised.


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (Shifts(fails=RuntimeError("no kernel")), "cannot be quantised: RuntimeError: no kernel"),
        (Shifts(fails=DreamkitError("no range at conv2")), "^no range at conv2$"),
        (Shifts(wrong=1.0), "does not do what the network does: outputs of up to"),
        (Shifts({"fc": float("nan")}), "not finite"),
    ],
)
def test_nothing_is_left_of_what_fails(toys, tmp_path, quantizer, message):
    with pytest.raises(DreamkitError, match=message):
        run(toys, tmp_path, quantizer)
    assert not (tmp_path / "quantized").exists()


def test_no_images_are_refused(toys, tmp_path):
    with pytest.raises(DreamkitError, match="source of training images is empty"):
        run(toys, tmp_path, count=0)


def test_a_network_of_broken_weights_names_where(toys, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from dreamkit.quantizers.onnx_runtime import OnnxQuantizer

    model = toys.plain()
    with torch.no_grad():
        model.conv2.bias[0] = float("nan")
    context = toys.context(tmp_path)
    with pytest.raises(DreamkitError, match="values that are not finite, which have no range"):
        Quantize(quantizer=OnnxQuantizer()).run(toys.teacher(model), toys.images(8), context)
    assert not (tmp_path / "quantized").exists()


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] if x.sum() > 0 else -x.flatten(1)[:, :3]


def test_a_network_that_cannot_be_exported_says_so(toys, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from dreamkit.quantizers.onnx_runtime import OnnxQuantizer

    context = toys.context(tmp_path)
    with pytest.raises(DreamkitError, match="cannot be exported as ONNX"):
        Quantize(quantizer=OnnxQuantizer()).run(toys.teacher(Branching()), toys.images(8), context)
    assert not (tmp_path / "quantized").exists()


# The tables.


def test_the_table_has_both_files():
    report = {
        "metrics": {
            "teacher.accuracy": 0.9,
            "int8.accuracy": 0.8876,
            "int8.agreement": 0.97,
            "float.bytes": 18_553_251.0,
            "int8.bytes": 5_074_009.0,
        },
        "details": {
            "quantization": {
                "compared": {"images": 64, "unseen": True},
                "latency": [{"batch_size": 1, "threads": 2, "float_ms": 34.04, "int8_ms": 17.6}],
                "noise": {"a": 1.25, "b": 2.0, "c": 3.0},
            }
        },
    }
    header, rows = quantization_rows(report)
    assert header[2:] == ["agreement, unseen images", "size", "ms for 1, 2 threads"]
    assert rows == [
        ["float", "0.9000", "-", "18.6 MB", "34"],
        ["int8", "0.8876", "0.9700", "5.07 MB", "17.6"],
    ]
    assert noise_line(report, 2) == (
        "The layers that integers make most noise of, as signal to noise: a (1.2 dB), b (2.0 dB)"
    )
    assert quantization_rows({"metrics": {}, "details": {}}) == ([], [])
    assert noise_line({"metrics": {}, "details": {}}) is None
