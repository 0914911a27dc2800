"""Files of weights as people have them: loaded, or refused in a sentence that says what to do."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import io
import json
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from dreamkit.errors import DreamkitError, MissingPath, OptionError, WeightsMismatch
from dreamkit.teachers.checkpoint_file import read_checkpoint
from dreamkit.teachers.timm import TimmTeacher
from dreamkit.teachers.torchvision import TorchvisionTeacher
from dreamkit.teachers.weights import check_weights, is_weights_file, load_file


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Split(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Attributes(dict):
    """A dictionary of a class of its own, as frameworks keep settings in."""


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net()


@pytest.fixture
def file(tmp_path):
    """Return a function that saves something and returns its path."""

    def save(content, name="w.pth.tar", **how):
        torch.save(content, tmp_path / name, **how)
        return str(tmp_path / name)

    return save


def renamed(net, change):
    return {change(name): value for name, value in net.state_dict().items()}


def loaded(path, *more, **options):
    model = Net()
    said = load_file(model, path, *more, **options)
    return model, said


def assert_loaded(model, net):
    for name, value in net.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "module.{}".format,
        "_orig_mod.{}".format,
        "module._orig_mod.{}".format,
        "_orig_mod.module.{}".format,
        "model.{}".format,
        "module.backbone.net.{}".format,
        lambda name: name.replace("features.", "features.module."),
        lambda name: "model." + name.replace("fc.", "fc._orig_mod."),
    ],
    ids=range(8),
)
def test_prefixes_of_wrappers_and_frameworks_are_taken_off_and_told(net, file, change):
    model, said = loaded(file(renamed(net, change)))
    assert_loaded(model, net)
    assert said
    assert all("was taken off its names" in sentence for sentence in said)


def test_a_prefix_that_the_network_has_itself_stays(net, file):
    wrapped = nn.DataParallel(net)
    path = file(wrapped.state_dict())
    assert load_file(nn.DataParallel(Net()), path) == []


def test_the_weights_of_what_a_network_wraps(net, file):
    outer = nn.Sequential(collections.OrderedDict(net=Net()))
    (said,) = load_file(outer, file(net.state_dict()))
    assert "'net.' was put before its names" in said
    assert_loaded(outer.net, net)


def test_weights_among_others_are_told_by_their_prefix(net, file):
    state = renamed(net, "model.{}".format) | {"criterion.weight": torch.ones(3)}
    with pytest.raises(WeightsMismatch, match=r"write prefix: model\.$"):
        loaded(file({"state_dict": state}))
    model, said = loaded(file({"state_dict": state}), prefix="model.")
    assert_loaded(model, net)
    assert "1 entries without 'model.' were left out" in said[-1]
    twins = renamed(net, "student.{}".format) | renamed(net, "teacher.{}".format)
    with pytest.raises(WeightsMismatch, match=r"prefix: student\. or prefix: teacher\."):
        loaded(file(twins))


def test_counters_of_other_tools_are_left_out(net, file):
    state = dict(net.state_dict(), total_ops=torch.zeros(1), n_averaged=torch.tensor(3))
    state |= {f"features.0.{name}": torch.zeros(1) for name in ("total_ops", "total_params")}
    model, said = loaded(file(state))
    assert_loaded(model, net)
    assert "n_averaged and total_ops and total_params were left out" in said[0]


def test_step_counters_are_not_missed_and_half_precision_is_taken(net, file):
    state = {k: v.half() for k, v in net.state_dict().items() if "num_batches" not in k}
    model, said = loaded(file(state))
    assert said == []
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, net.fc.weight.half().float())


def test_another_number_of_classes_is_told_with_both_numbers(net, file):
    other = renamed(Net(5), "module.{}".format)
    with pytest.raises(WeightsMismatch, match=r"its last layer has 5 outputs, the model's 3"):
        loaded(file(other))
    wide = dict(net.state_dict(), **{"features.0.weight": torch.ones(4, 3, 5, 5)})
    with pytest.raises(WeightsMismatch, match=r"1 of other shape: features.0.weight") as caught:
        loaded(file(wide))
    assert "last layer" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_tensor_in_a_state_dict_is_named(net, file):
    with_state = dict(net.state_dict(), _extra_state={"version": 3})
    with pytest.raises(WeightsMismatch, match=r"_extra_state \(dict\).*extra state"):
        loaded(file(with_state))
    quantised = dict(net.state_dict())
    quantised["fc.weight"] = torch.quantize_per_tensor(net.fc.weight, 0.1, 0, torch.qint8)
    with pytest.raises(WeightsMismatch, match=r"fc.weight \(torch.qint8\): quantised"):
        loaded(file(quantised))
    packed = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    packed |= {"fc.scale": torch.tensor(1.0), "fc._packed_params.dtype": torch.qint8}
    packed |= {"fc._packed_params._packed_params": (quantised["fc.weight"], None)}
    with pytest.raises(WeightsMismatch, match=r"fc\._packed_params\.dtype \(dtype\)"):
        loaded(file(packed))


# --- where in the file ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "state.model", "net.weights.ema"])
def test_the_one_state_dict_that_fits_is_found_and_told(net, file, key):
    content = dict(net.state_dict())
    for step in reversed(key.split(".")):
        content = {step: content}
    optimizer = torch.optim.Adam(net.parameters())
    content |= {"epoch": 3, "best": torch.tensor(0.9), "optimizer": optimizer.state_dict()}
    content |= {"criterion": {"weight": torch.ones(3)}}
    model, said = loaded(file(content))
    assert_loaded(model, net)
    assert said[0].endswith(f"the state dict is that of key: {key}")
    assert loaded(file(content), key)[1] == []


def test_of_several_that_fit_one_is_to_be_chosen(net, file):
    ema = {name: value + 1 for name, value in net.state_dict().items()}
    path = file({"state_dict": net.state_dict(), "state_dict_ema": ema, "epoch": 1})
    with pytest.raises(DreamkitError, match=r"key: state_dict or key: state_dict_ema"):
        loaded(path)
    model, _ = loaded(path, "state_dict_ema")
    assert torch.equal(model.fc.weight, net.fc.weight + 1)


def test_of_several_that_do_not_fit_the_nearest_is_told(net, file):
    content = {"other": {"w": torch.ones(2)}, "state_dict": Net(5).state_dict()}
    with pytest.raises(WeightsMismatch, match=r"\(key: state_dict\) does not fit.*5 outputs"):
        loaded(file(content))


def test_keys_with_dots_in_them(net, file):
    model, _ = loaded(file({"a.b": net.state_dict(), "c": net.state_dict()}), "a.b")
    assert_loaded(model, net)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)] * 3, r"it is a list of 3, and nothing tells which layer each is of"),
        (torch.ones(2, 3), r"it is one tensor, of shape \(2, 3\)"),
        ({}, "it is empty"),
        ({"epoch": 3, "lr": 0.1}, "it holds: epoch, lr; give 'key'"),
    ],
    ids=["list", "tensor", "nothing", "numbers"],
)
def test_what_is_no_state_dict(file, content, message):
    with pytest.raises(DreamkitError, match=message):
        loaded(file(content))


# --- what is pickled beside them --------------------------------------------------------------


BESIDE = {
    "arguments": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs")),
    "numpy": [numpy.float64(0.9), numpy.arange(3), numpy.dtype("float32"), numpy.random.PCG64()],
    "path": pathlib.Path("data"),
    "when": [datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.UTC],
    "lists": [collections.deque([1, 2]), collections.Counter("aab"), {1, 2}, frozenset({3})],
    "default": collections.defaultdict(list, a=[1]),
    "own": [Split.TRAIN, Settings(0.2), Attributes(lr=0.1)],
    "numbers": [complex(1, 2), slice(1, 2), range(3), 2**80, b"bytes", bytearray(b"x")],
    "device": [torch.device("cpu"), torch.float16, torch.Size([1])],
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_tensors_does_not_matter(net, file, beside, legacy):
    content = {"state_dict": net.state_dict(), "beside": BESIDE[beside]}
    how = {"_use_new_zipfile_serialization": not legacy}
    model, _ = loaded(file(content, **how))
    assert_loaded(model, net)


@pytest.mark.parametrize(
    "kind", [collections.OrderedDict, lambda s: collections.defaultdict(dict, s), Attributes]
)
def test_mappings_of_other_classes_hold_state_dicts_too(net, file, kind):
    assert_loaded(loaded(file({"state_dict": kind(net.state_dict())}))[0], net)


def test_no_class_of_the_file_is_imported(net, file, tmp_path, monkeypatch):
    (tmp_path / "settings_of_training.py").write_text("class Config:\n    lr = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import settings_of_training

    path = file({"state_dict": net.state_dict(), "config": settings_of_training.Config()})
    del sys.modules["settings_of_training"]
    allowed = set(torch.serialization.get_safe_globals())
    assert_loaded(loaded(path)[0], net)
    assert "settings_of_training" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == allowed


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "function",
    [open, eval, exec, subprocess.check_call, __import__, pickle.loads],
    ids=lambda f: f.__name__,
)
def test_a_file_that_asks_to_run_something_is_refused_and_runs_nothing(
    net, file, tmp_path, function, legacy
):
    mark = tmp_path / "ran"
    arguments = {
        "open": [str(mark), "w"],
        "eval": [f"open({str(mark)!r}, 'w')"],
        "exec": [f"open({str(mark)!r}, 'w')"],
        "check_call": [["touch", str(mark)]],
    }.get(function.__name__, ["json"])
    content = {"state_dict": net.state_dict(), "more": Calls(function, *arguments)}
    path = file(content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DreamkitError, match=rf"refused: .*{function.__name__}"):
        loaded(path)
    assert not mark.exists()


def test_functions_that_are_not_known_are_not_called(net, file, tmp_path):
    made = Calls(tempfile.mkdtemp, "ran", "", str(tmp_path))
    path = file({"state_dict": net.state_dict(), "more": made})
    assert_loaded(loaded(path)[0], net)
    assert [found.name for found in tmp_path.iterdir()] == ["w.pth.tar"]


def test_whole_networks_are_refused_by_their_class_with_the_cure(net, file):
    with pytest.raises(DreamkitError, match=r"refused: .*Net, and.*torch.save\(model.state_dict"):
        loaded(file(net))
    with pytest.raises(DreamkitError, match=r"model \(an object of .*Net\).*model.state_dict"):
        loaded(file({"epoch": 3, "model": net}))


# --- other files ------------------------------------------------------------------------------


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def tarred(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    numpy.savez(buffer, w=numpy.ones(2))
    return buffer.getvalue()


FILES = {
    "empty.pth": (lambda: b"", "is empty"),
    "lfs.pth": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "git lfs pull",
    ),
    "page.pth": (lambda: b"\n<!DOCTYPE html><html>404</html>", "a web page"),
    "keras.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"),
    "net.tflite": (lambda: bytes(4) + b"TFL3" + bytes(9), "TensorFlow Lite"),
    "net.onnx": (lambda: b"\x08\x07", "ONNX"),
    "w.npy": (lambda: b"\x93NUMPY\x01", "NumPy"),
    "w.npz": (npz, "NumPy"),
    "w.gz": (lambda: b"\x1f\x8b\x08", "unpack it"),
    "several.zip": (lambda: zipped(["a.pth", "b.pth"]), r"an archive \(a.pth, b.pth\): unpack"),
    "old.pth.tar": (lambda: tarred(["pickle", "storages", "tensors"]), "before 0.2"),
    "packed.tar": (lambda: tarred(["net.pth"]), r"an archive \(net.pth\): unpack"),
    "plain.pkl": (lambda: pickle.dumps({"w": 1}), "written by pickle"),
    "script.pt": (torchscript, r"TorchScript.*torch.jit.load\(path"),
    "cut.pth": (lambda: zipped(["archive/data.pkl"])[:40], "cut short or damaged"),
    "m.safetensors.index.json": (
        lambda: json.dumps({"weight_map": {}}).encode(),
        "several files: write them into one",
    ),
    "settings.json": (lambda: b"{}", "JSON"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", FILES)
def test_other_files_are_named_for_what_they_are_before_anything_is_read(tmp_path, name):
    make, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(OptionError, match=message) as caught:
        check_weights("path", str(path))
    assert caught.value.option == "path"
    with pytest.raises(DreamkitError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.safetensors.index.json"], "weights in several files"),
        (["artifact.json", "model.safetensors"], "source: student"),
        (["student/artifact.json"], "the directory of a run"),
        (["saved_model.pb"], "TensorFlow"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
        (["data.pkl", "version"], "unpacked archive"),
        (["a.pth", "b.pth"], r"a folder \(a.pth, b.pth\)"),
        ([], r"a folder \(empty\)"),
    ],
)
def test_folders_are_named_for_what_they_are(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(OptionError, match=message):
        check_weights("path", str(tmp_path))


@pytest.mark.parametrize("name", ["w", "w.pth", "w.pt2", "w.weights", "w.safetensors"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_a_file_is_read_by_its_content_whatever_it_is_called(net, tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path, metadata={"format": "pt"})
    elif name == "w.safetensors":
        pytest.skip("a name that promises another content")
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == "torch")
    assert_loaded(loaded(str(path))[0], net)


def test_a_home_is_found(net, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    check_weights("path", "~/w.pth")
    assert_loaded(loaded("~/w.pth")[0], net)


def test_a_missing_file_is_told_with_the_place_that_was_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingPath, match=rf"no such file: w.pth \(.*{tmp_path}\)"):
        check_weights("path", "w.pth")
    with pytest.raises(MissingPath, match=r"written with '/'"):
        check_weights("path", r"C:\nets\w.pth")
    with pytest.raises(OptionError, match="is an address: download it"):
        check_weights("path", "https://example.org/w.pth")


# --- a path or a name -------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model_best.pth.tar", "./w", "nets/w", "~/w", "w.pkl", "../w"])
def test_what_is_written_as_a_path_is_one(weights):
    assert is_weights_file(weights)
    for source in (TorchvisionTeacher, TimmTeacher):
        with pytest.raises(MissingPath, match="no such file"):
            source("resnet18", weights=weights)


def test_a_file_without_a_suffix_is_a_path_and_a_name_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"no weights 'best'.*the path of a file"):
        TorchvisionTeacher("resnet18", weights="best")
    torch.save(Net().state_dict(), "best")
    assert is_weights_file("best")
    TorchvisionTeacher("resnet18", weights="best")
    (tmp_path / "default").write_text("of another tool")
    assert not is_weights_file("default")


def test_published_forms_reach_the_other_sources(tmp_path):
    made = TimmTeacher("test_resnet", weights=None, num_classes=4).load(1)
    state = {f"module.{name}": value for name, value in made.model.state_dict().items()}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "last.pth.tar")
    path = str(tmp_path / "last.pth.tar")
    teacher = TimmTeacher("test_resnet", weights=path, num_classes=4).load(0)
    assert teacher.card.weights_sha256 == made.card.weights_sha256
    assert [said.removeprefix(f"{path}: ") for said in teacher.notes] == [
        "the state dict is that of key: state_dict",
        "'module.' was taken off its names",
    ]
