"""Looking teachers over, tables of latencies, and files for other runtimes, by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import dreamkit
from dreamkit.bench.latency_tables import _measured_by, build_for, check_for
from dreamkit.card import Card
from dreamkit.deploy import exporting
from dreamkit.deploy.formats import TorchScript
from dreamkit.errors import DreamkitError
from dreamkit.latency.onnx_runtime import OnnxRuntime
from dreamkit.latency.sampling import mean_times, repeated_times
from dreamkit.plugins import build_registries
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.stages.measuring import time_models
from dreamkit.store.artifact import write_artifact
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.named import load_named
from dreamkit.types import LatencyBackend, Timing

DIGITS = "bundled:digits_resnet8"
CIFAR = "cifar:resnet20"


# --- doctor -----------------------------------------------------------------------------------


def test_the_doctor_tells_what_can_be_done(invoke):
    code, out, _ = invoke("doctor", DIGITS, "--device", "cpu")
    assert code == 0
    assert "10 classes, 1x8x8" in out
    assert "inversion: yes, 9 BatchNorm layers" in out
    groups, channels = re.search(r"pruning: (\d+) channel groups, (\d+) channels", out).groups()
    found, _ = ChannelGraph(BundledTeacher("digits_resnet8").build(), (1, 8, 8)).groups()
    assert (int(groups), int(channels)) == (len(found), sum(group.channels for group in found))
    assert "makes the model's outputs" in out


def test_a_network_without_batch_norm_can_be_pruned_all_the_same(invoke):
    code, out, _ = invoke("doctor", "torchvision:alexnet", "--device", "cpu")
    assert code == 0
    assert "inversion: yes, without BatchNorm: by patch_similarity" in out
    assert "pruning: 7 channel groups" in out


@pytest.mark.parametrize(
    ("named", "message"),
    [("resnet50", "write SOURCE:MODEL"), ("bundled:digits_resnet9", "did you mean")],
)
def test_a_teacher_that_is_not_there(invoke, named, message):
    code, _, err = invoke("doctor", named)
    assert code == 2
    assert message in err


def test_parts_of_a_network_are_no_network(invoke, tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n\n\ndef make():\n    pass\n")
    code, _, err = invoke("doctor", tmp_path / "net.py")
    assert code == 2
    assert "write a recipe whose teacher is {source: checkpoint, builder:" in err


def test_a_student_whose_builder_has_to_be_trusted_names_what_a_recipe_says(invoke, tmp_path):
    card = Card("it", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 4, "here")
    builder = {"source": "checkpoint", "builder": "net:make"}
    write_artifact(tmp_path / "student", nn.Linear(2, 4), card, builder, {})
    code, _, err = invoke("doctor", tmp_path)
    assert code == 2
    assert f"whose teacher is {{source: student, path: {tmp_path / 'student'}, allow" in err
    assert "allow_builder: true}" in err


# --- look-up tables ---------------------------------------------------------------------------


def test_a_table_is_built_once_shown_and_held_against_networks(tmp_path, invoke):
    path = tmp_path / "tables" / "t.json"
    build = ("lut", "build", DIGITS, "--out", path, "--least", "0.75", "--threads", "1")
    code, out, _ = invoke(*build)
    assert code == 0
    number = int(re.search(r"(\d+) layers measured", out).group(1))
    points = json.loads(path.read_text())["points"]
    assert len(points) == number > 10
    first = path.read_bytes()
    code, out, _ = invoke(*build)
    assert f"0 layers measured, {number} were there" in out
    assert path.read_bytes() == first
    code, out, _ = invoke(
        "lut", "show", path, "--teacher", DIGITS, "--variants", "3", "--seconds", "1"
    )
    assert code == 0
    assert "threads: 1" in out
    assert "3x3 on 8x8, stride 1" in out
    assert re.search(r"R² -?\d\.\d+|R² -?\d+\.\d+", out)
    assert len(re.findall(r"pruned \d", out)) == 3


class Counted(LatencyBackend):
    """A target of someone else's: a model takes a microsecond a parameter."""

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size

    def describe(self) -> dict[str, str]:
        return {"board": "mine", "batch_size": str(self.batch_size)}

    def time(self, modules: list[tuple[nn.Module, Tensor]]) -> list[Timing]:
        sizes = [sum(p.numel() for p in module.parameters()) for module, _ in modules]
        return [Timing(1e-3 * size, 0.0) for size in sizes]


def test_a_table_is_held_against_networks_on_whatever_measured_it(tmp_path, capsys):
    registries, path = build_registries(), tmp_path / "t.json"
    registries["latency_backends"].register("a-board", Counted, "someone")
    digits = load_named(registries, "--teacher", DIGITS, "null")
    build_for(registries, digits, path, "a-board", {"batch_size": 2}, 0.75, Console())
    check_for(registries, digits, path, 3, 0, 1.0, Console())
    assert re.search(r"R² 0\.99|R² 1\.0", capsys.readouterr().out)
    with pytest.raises(DreamkitError, match=r"on another target .*board mine there, None here"):
        check_for(build_registries(), digits, path, 3, 0, 1.0, Console())


PLUGIN = """
from dreamkit.registry import hookimpl
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.types import LatencyBackend, Timing

class Board(LatencyBackend):
    def __init__(self, batch_size: int = 1):
        self.batch_size = batch_size

    def describe(self):
        return {"board": "theirs"}

    def time(self, modules):
        return [Timing(1e-3 * sum(p.numel() for p in m.parameters()), 0.0) for m, _ in modules]

@hookimpl
def register_latency_backends(register):
    register("their-board", Board)

@hookimpl
def register_teachers(register):
    register("theirs", BundledTeacher)
"""


def test_a_plugins_board_and_teacher_are_measured(tmp_path, invoke):
    plugin, path = tmp_path / "board.py", tmp_path / "t.json"
    plugin.write_text(PLUGIN)
    named = ("theirs:digits_resnet8", "--plugin", plugin)
    board = ("--backend", "their-board", "--least", "0.75")
    code, _, err = invoke("lut", "build", *named, "--out", path, *board)
    assert code == 0, err
    assert json.loads(path.read_text())["target"]["board"] == "theirs"
    code, out, _ = invoke("lut", "show", path, "--variants", "3", "--teacher", *named)
    assert code == 0
    assert re.search(r"R² 0\.99|R² 1\.0", out)
    code, out, _ = invoke("doctor", *named, "--device", "cpu")
    assert code == 0
    assert "inversion: yes" in out
    swept = ("--source", "theirs", "--models", "digits_resnet8", "--steps", "2", "--device", "cpu")
    rows = tmp_path / "rows.json"
    code, _, err = invoke("bench", "teachers", *swept, "--json", rows, "--plugin", plugin)
    assert code == 0, err
    (row,) = json.loads(rows.read_text())["teachers"]
    assert (row["source"], row["reasons"]) == ("theirs", [])
    code, _, err = invoke("doctor", named[0])
    assert code == 2
    assert "'theirs'" in err


def test_networks_are_timed_until_their_means_are_sure(monkeypatch):
    calls = []

    def time(self, modules):
        calls.append(len(modules))
        return [Timing(100.0 + (-1) ** len(calls), 0.0) for _ in modules]

    monkeypatch.setattr(Counted, "time", time)
    module = (nn.Identity(), torch.zeros(1))
    assert mean_times(Counted(), [module] * 2, 60.0) == [99.8, 99.8]
    # Four runs leave sqrt(4/3) / sqrt(4) = 0.58 % of doubt, five sqrt(1.2) / sqrt(5) = 0.49 %.
    assert calls == [2] * 5
    calls.clear()
    mean_times(Counted(), [module], 0.0)
    assert calls == [1] * 3, "as often as it takes to know how sure they are"


@pytest.mark.parametrize(
    ("times", "expected", "differing"),
    [
        ([47.0, 48.0], 47.5, 48 / 47 - 1),
        ([2128.0, 47.0, 48.0], 48.0, 48 / 47 - 1),  # the first beside other work
        ([47.0, 90.0, 200.0], 90.0, 90 / 47 - 1),
    ],
)
def test_a_time_that_a_repeat_does_not_confirm_is_settled_by_a_third(
    monkeypatch, times, expected, differing
):
    left = list(times)
    monkeypatch.setattr(Counted, "time", lambda self, modules: [Timing(left.pop(0), 1.0)])
    (timing,), disagreement = repeated_times(Counted(), [(nn.Identity(), torch.zeros(1))])
    assert timing == Timing(expected, 1.0)
    assert disagreement == pytest.approx(differing)
    assert left == []


def test_times_that_do_not_agree_are_told(monkeypatch):
    notes, left = [], [47.0, 90.0, 200.0, 10.0, 10.5]
    monkeypatch.setattr(Counted, "time", lambda self, modules: [Timing(left.pop(0), 1.0)])
    for _ in range(2):
        found = time_models({"student": (nn.Linear(2, 2), (1, 8, 8))}, Counted(), notes.append)
    assert found["student"].median_ms == 10.25
    (note,) = notes
    assert note.startswith("timing student three times, even the nearest two differ by 91%")


def test_a_table_of_another_target_is_not_gone_on_with(tmp_path, invoke):
    path = tmp_path / "t.json"
    build = ("lut", "build", DIGITS, "--out", path, "--least", "1")
    assert invoke(*build, "--threads", "1")[0] == 0
    before = path.read_bytes()
    code, _, err = invoke(*build, "--threads", "1", "--batch-size", "2")
    assert code == 2
    assert "another target (batch_size 1 there, 2 here)" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 9}'])
def test_a_file_that_is_no_table(tmp_path, invoke, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    code, _, err = invoke("lut", "show", path)
    assert code == 2
    assert "cannot be read as a latency table" in err


def test_a_table_in_integers_is_none_in_float(tmp_path, invoke):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    path = tmp_path / "t.json"
    build = ("lut", "build", DIGITS, "--out", path, "--least", "1", "--backend", "onnxruntime")
    code, _, err = invoke(*build, "--threads", "1", "--dtype", "int8")
    assert code == 0, err
    assert json.loads(path.read_text())["target"]["dtype"] == "int8"
    code, _, err = invoke(*build, "--threads", "1")
    assert code == 2
    assert "dtype int8 there, float32 here" in err
    code, out, _ = invoke("lut", "show", path)
    assert code == 0
    assert "dtype: int8" in out
    backend, _ = _measured_by(build_registries(), json.loads(path.read_text())["target"])
    assert backend == OnnxRuntime(threads=1, dtype="int8"), "networks are timed in it too"


def test_a_dtype_that_a_backend_does_not_have(tmp_path, invoke):
    build = ("lut", "build", DIGITS, "--out", tmp_path / "t")
    code, _, err = invoke(*build, "--backend", "onnxruntime", "--dtype", "int4")
    assert code == 2
    assert "dtype: should be 'float32' or 'int8' (got 'int4')" in err
    code, _, err = invoke(*build, "--dtype", "int8")
    assert code == 2
    assert "the latency backend torch-cpu has no option 'dtype'" in err


def test_an_unknown_backend(tmp_path, invoke):
    code, _, err = invoke("lut", "build", DIGITS, "--out", tmp_path / "t", "--backend", "torch-cpi")
    assert code == 2
    assert "did you mean 'torch-cpu'?" in err


# --- export -----------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Save a pruned student as a run does; return the run's directory."""
    teacher = BundledTeacher("digits_resnet8").load(0)
    graph = ChannelGraph(teacher.model, (1, 8, 8))
    graph.remove({group.name: range(group.channels // 2) for group in graph.groups()[0]})
    pruning_record, folder = graph.pruning_record.to_json(), tmp_path / "run" / "student"
    write_artifact(folder, teacher.model, teacher.card, teacher.builder, pruning_record)
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "torchscript"])
@pytest.mark.parametrize("more", [(), ("--batch-size", "1")], ids=["any", "one"])
def test_exported_files_do_what_the_model_does(student, invoke, kind, more):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    code, out, _ = invoke("export", student, "--format", kind, *more)
    assert code == 0
    assert "agrees with the model in 100.0%" in out
    assert re.search(r"student: \d+\.\d+ ms", out)
    assert re.search(r"unpruned: \d+\.\d+ ms", out)
    (path,) = (student / "student").glob("model.[op]*")
    model = dreamkit.load_student(student / "student")
    for count in [1] if more else [1, 5]:
        x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            found = exporting.find_exporter(kind).load(path)(x)
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-3)


def test_a_file_that_does_something_else_is_not_written(student, invoke, monkeypatch):
    load = TorchScript.load

    def other(self, path):
        run = load(self, path)
        return lambda images: run(images) + 0.1

    monkeypatch.setattr(TorchScript, "load", other)
    code, _, err = invoke("export", student, "--format", "torchscript")
    assert code == 2
    assert "does not do what the model does" in err
    assert {file.name for file in (student / "student").iterdir()} == {
        "artifact.json",
        "model.safetensors",
    }


def test_a_model_that_cannot_be_exported(student, invoke, monkeypatch):
    class Odd(torch.nn.Module):
        card = Card("odd", (1, 8, 8), (0.5,), (0.5,), 2, "")

        def forward(self, x):
            if float(x.sum()) > 0:
                return x.flatten(1)[:, :2]
            return x.flatten(1)[:, 2:4]

    monkeypatch.setattr(exporting, "load_student", lambda *a, **k: Odd())
    code, _, err = invoke("export", student, "--format", "torch-export")
    assert code == 2
    assert "cannot be exported as torch-export: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("out", "message"),
    [(".", "is a folder: name the file itself"), ("file/model.pt", "cannot be written: ")],
)
def test_a_place_where_no_file_can_be(student, tmp_path, invoke, out, message):
    (tmp_path / "file").write_text("")
    code, _, err = invoke("export", student, "--format", "torchscript", "--out", tmp_path / out)
    assert code == 2
    assert message in err
    code, _, err = invoke("lut", "build", DIGITS, "--out", tmp_path / "file" / "t.json")
    assert code == 2
    assert "cannot be made: " in err


def test_an_unknown_format(student, invoke):
    code, _, err = invoke("export", student, "--format", "onxn")
    assert code == 2
    assert "did you mean 'onnx'?" in err


class Pairs:
    """A format of someone else's: the weights of a linear model."""

    suffix = ".npz"

    def write(self, model, example, path, any_batch):
        values = {name: value.numpy() for name, value in model.state_dict().items()}
        numpy.savez(path, **values)

    def load(self, path):
        held = {name: torch.from_numpy(value) for name, value in numpy.load(path).items()}
        return lambda images: images.flatten(1) @ held["1.weight"].T + held["1.bias"]


def test_a_network_in_memory_is_exported_to_a_plugins_format(tmp_path):
    registries = build_registries()
    registries["exporters"].register("pairs", Pairs, "someone")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).train()
    path = tmp_path / "new" / "model.npz"
    found = exporting.export_model(model, (3, 2, 2), "pairs", path, registries=registries)
    assert (found.path, found.images, found.agreement) == (path, 64, 1.0)
    assert found.max_error <= 1e-3 * found.largest
    assert model.training, "it stays as it was"
    assert [file.name for file in path.parent.iterdir()] == ["model.npz"]
    images = torch.ones(2, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(Pairs().load(path)(images), model(images))
    card = Card("toy", (3, 2, 2), (0.5,) * 3, (0.5,) * 3, 3, "")
    script = exporting.export_model(model, card, "torchscript", tmp_path / "m.pt", batch_size=2)
    assert script.images == 2


def test_nothing_to_export(tmp_path, invoke):
    code, _, err = invoke("export", tmp_path)
    assert code == 2
    assert "holds no student" in err


def test_the_doctor_takes_a_recipe_of_which_the_teacher_alone_is_valid(invoke, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nteacher: {source: bundled, model: digits_resnet8}\n"
        "application: {name: nonesuch}\n"
        "presets:\n  seven: {teacher: {model: digits7_resnet8}}\n"
    )
    code, out, err = invoke("doctor", str(file), "--device", "cpu", "--batch-size", "1")
    assert code == 0, err
    assert "digits_resnet8" in out
    assert "inversion: yes" in out
    code, out, _ = invoke("doctor", str(file), "--preset", "seven", "--device", "cpu")
    assert code == 0
    assert "7 classes" in out
    code, _, err = invoke("doctor", str(file), "--set", "teacher.model=digits_resnet9")
    assert code == 2
    assert "--set teacher.model" in err
    code, _, err = invoke("doctor", str(file), "--weights", "null")
    assert (code, "teacher.weights=null" in err) == (2, True)
    code, _, err = invoke("doctor", "bundled:digits_resnet8", "--preset", "smoke")
    assert (code, "are for recipes" in err) == (2, True)
