"""The application ``quantize``: what it compares, keeps, says and refuses."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dreamkit.applications.quantize import Quantize
from dreamkit.errors import ArtifactError, DreamkitError, OptionError
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.report.tables import noise_line, quantization_rows
from dreamkit.stages.keeping_float import effects
from dreamkit.stages.quantization_aware import QuantizationAwareTraining
from dreamkit.stages.quantized_file import check_quantized
from dreamkit.stages.quantizing import (
    calibrated,
    calibration_parts,
    hash_images,
    neighbour_correlation,
    training_parts,
)
from dreamkit.store.source import Dreams
from dreamkit.types import (
    Application,
    FileLook,
    Outcome,
    Quantization,
    Quantizer,
    Simulation,
    StoredImages,
    Timing,
)

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

    def __init__(self, shifts=None, saturates=False, wrong=0.0, times=None, fails=None):
        self.shifts = shifts or {"conv1": 0.0, "conv2": 0.01, "fc": 0.02}
        self.saturates, self.wrong, self.times = saturates, wrong, times or {}
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
            logits = self.model(images).detach() + shift * torch.tensor([1.0, 0.0, -1.0])
            return -logits if turned else logits

        run.ms = 1.0 + sum(ms for name, ms in self.times.items() if name not in names)
        return run


@pytest.fixture(autouse=True)
def _told_times(monkeypatch):
    """Files take as long as they say: what a busy machine measures is nothing to test with."""

    def alternate(calls, warmup, repeats):
        return [Timing(call.func.ms, 0.0) for call in calls]

    monkeypatch.setattr("dreamkit.stages.quantizing.alternate", alternate)


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


@pytest.mark.parametrize(
    ("images", "fitted", "compared", "apart"),
    [(400, 300, 100, True), (128, 96, 32, True), (127, 127, 127, False), (4000, 3488, 512, True)],
)
def test_what_is_compared_on_was_not_trained_on(toys, images, fitted, compared, apart):
    parts = training_parts(toys.images(images), seed=1)
    assert (len(parts.fitted), len(parts.compared), parts.apart) == (fitted, compared, apart)
    assert apart == (not set(parts.fitted.chosen) & set(parts.compared.chosen))


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
    slow = Shifts(times={"float": 3.0})  # what is not the float file takes three more
    log = run(toys, tmp_path, slow, latency_batches=(1, 4))
    rows = log.details["quantization"]["latency"]
    assert {(row["batch_size"], row["threads"]) for row in rows} >= {(1, 1), (4, 1)}
    assert all((row["float_ms"], row["int8_ms"]) == (1.0, 4.0) for row in rows)
    assert log.metrics["int8.speedup"] == 0.25
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
    ("times", "kept"),
    [
        ({}, ["fc", "conv2"]),
        ({"conv2": 2.0}, ["fc"]),
        ({"fc": 2.0}, []),
    ],
)
def test_those_of_most_effect_stay_in_float_as_time_allows(toys, tmp_path, times, kept):
    quantizer = Shifts(times=times)
    log = run(toys, tmp_path, quantizer, keep_float="auto", float_budget=0.5)
    assert log.details["quantization"]["kept_float"] == kept
    assert list(log.details["quantization_effects"])[:2] == ["fc", "conv2"]


# Training.


class Scaled(Simulation):
    """The network times what is learned, wrong by a half to begin with."""

    def __init__(self, owner, model):
        super().__init__()
        self.model, self.owner = model.requires_grad_(False), owner
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        return self.scale * self.model(images)

    def trained(self):
        self.owner.scale = float(self.scale.detach())
        return Shifting(self.owner, self.model)


class Breaks(Scaled):
    """What it returns is no number once anything was learned."""

    def forward(self, images):
        return super().forward(images) * torch.where(self.scale == 0.5, 1.0, torch.nan)


class Trains(Shifts):
    """A quantizer that can train."""

    simulation = Scaled

    def calibrate(self, step):
        made = super().calibrate(step)
        made.simulated = lambda keep_float=(): self.note_kept(keep_float, step)
        return made

    def note_kept(self, keep_float, step):
        self.kept = keep_float
        return self.simulation(self, copy.deepcopy(step.model))


def test_training_is_taught_by_float_on_what_is_not_compared_on(toys, tmp_path):
    quantizer = Trains()
    log = run(
        toys,
        tmp_path,
        quantizer,
        count=200,
        training=QuantizationAwareTraining(steps=80, lr=0.05, temperature=1.0),
        keep_float=("conv1",),
        calibration_images=40,
    )
    assert 0.9 < quantizer.scale < 1.1
    assert sum(quantizer.seen) == 40
    assert quantizer.kept == ("conv1",)
    assert quantizer.calls == [()]  # which layers stay is settled before the training
    assert log.metrics["training.steps"] == 80
    assert log.details["quantization"]["kept_float"] == ["conv1"]
    note = "calibrated on 40 images, trained on 150, and compared with float on 50 others"
    assert any(note in found for found in log.notes)


def test_few_images_are_trained_on_and_compared_on(toys, tmp_path):
    training = QuantizationAwareTraining(steps=1)
    log = run(toys, tmp_path, Trains(), count=40, training=training)
    assert any("measured on what was trained on. Of 128 and more" in note for note in log.notes)


def test_a_quantizer_that_cannot_train_is_told(toys, tmp_path):
    with pytest.raises(DreamkitError, match="cannot train in integers") as error:
        run(toys, tmp_path, training=QuantizationAwareTraining(steps=1))
    assert error.value.path == ("training",)
    assert not (tmp_path / "quantized").exists()


def test_a_training_that_diverges_leaves_nothing(toys, tmp_path):
    quantizer = Trains()
    quantizer.simulation = Breaks
    with pytest.raises(DreamkitError, match="diverged") as error:
        run(toys, tmp_path, quantizer, training=QuantizationAwareTraining(steps=5))
    assert error.value.path == ("training", "lr")
    assert not (tmp_path / "quantized").exists()


def test_features_cannot_be_taught():
    with pytest.raises(OptionError, match="tells of logits alone"):
        QuantizationAwareTraining(features=1.0)


# After another application.


class Halved(Application):
    """Makes a student of other outputs, and tells on which images."""

    def __init__(self, makes=True, dreams=True, images=None):
        self.makes, self.dreams, self.images = makes, dreams, images

    @property
    def needs_synthesis(self):
        return self.dreams

    def run(self, teacher, images, context):
        self.given = images
        if not self.makes:
            return Outcome(images=images)
        context.log.metrics["teacher.accuracy"] = 0.5
        student = self.make_student(teacher, context)
        with torch.no_grad():
            for value in student.model.parameters():
                value.mul_(0.5)
        self.made = replace(student, card=replace(student.card, name="halved"))
        return Outcome(self.made, images, same_layers=("pruned",))


def run_after(toys, folder, maker, images, **options):
    teacher, evaluation = toys.teacher(toys.two_bn()), toys.images(30)
    context = toys.context(folder, evaluation=evaluation)
    application = Quantize(Shifts({"fc": 0.0}), maker, latency_batches=(), **options)
    assert application.needs_synthesis == maker.dreams
    return teacher, application.run(teacher, images, context), context.log


def test_a_student_is_made_first_and_it_is_what_is_written(toys, tmp_path):
    maker, images = Halved(), toys.images(80)
    teacher, outcome, log = run_after(toys, tmp_path, maker, images)
    assert maker.given is images
    assert outcome.student is maker.made
    assert outcome.same_layers == ("pruned",)
    told = json.loads((tmp_path / "quantized/model.int8.json").read_text())
    assert told["card"]["name"] == "halved"
    right = accuracy(maker.made.model, toys.images(30), teacher.card, torch.device("cpu"))
    metrics = log.metrics
    assert metrics["teacher.accuracy"] == 0.5  # the student's is its own
    assert metrics["student.accuracy"] == metrics["int8.accuracy"] == pytest.approx(right)
    assert metrics["int8.accuracy_ratio"] == pytest.approx(right / 0.5)
    _, rows = quantization_rows({"metrics": metrics, "details": log.details})
    assert [row[0] for row in rows] == ["student, float", "student, int8"]


def test_the_images_of_what_comes_before_are_opened(toys, tmp_path):
    from dreamkit.api.given_images import GivenImages

    maker = Halved(dreams=False, images=GivenImages(toys.images(40).images, "images"))
    run_after(toys, tmp_path, maker, None)
    assert len(maker.given) == 40


def test_what_makes_no_student_is_refused(toys, tmp_path):
    with pytest.raises(DreamkitError, match="this application makes no student"):
        run_after(toys, tmp_path, Halved(makes=False), toys.images(8))


def test_images_of_its_own_are_refused_behind_another():
    with pytest.raises(OptionError, match="its student was made on"):
        Quantize(after=Halved(), images=Dreams())


class Competing(Halved):
    """Dreams against the student that it trains."""

    trains_student = True

    def make_student(self, teacher, context):
        return "its own"

    def planned(self, teacher, synthesis, context):
        return "its plan", context


def test_a_dry_run_asks_what_comes_before(toys, tmp_path):
    teacher, context = toys.teacher(toys.two_bn()), toys.context(tmp_path)
    application = Quantize(after=Competing())
    assert application.trains_student
    assert application.make_student(teacher, context) == "its own"
    assert application.planned(teacher, "synthesis", context) == ("its plan", context)
    assert not Quantize().trains_student
    assert Quantize().planned(teacher, "synthesis", context) == ("synthesis", context)


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
                "network": "teacher",
                "compared": {"images": 64, "unseen": True},
                "latency": [{"batch_size": 1, "threads": 2, "float_ms": 34.04, "int8_ms": 17.6}],
                "noise": {"a": 1.25, "b": 2.0, "c": 3.0},
            }
        },
    }
    header, rows = quantization_rows(report)
    assert header[2:] == ["agreement, unseen images", "size", "ms for 1, 2 threads"]
    assert rows == [
        ["teacher, float", "0.9000", "-", "18.6 MB", "34"],
        ["teacher, int8", "0.8876", "0.9700", "5.07 MB", "17.6"],
    ]
    assert noise_line(report, 2) == (
        "The layers that integers make most noise of, as signal to noise: a (1.2 dB), b (2.0 dB)"
    )
    assert quantization_rows({"metrics": {}, "details": {}}) == ([], [])
    assert noise_line({"metrics": {}, "details": {}}) is None
