"""Saved students: the same outputs in a fresh process, without pickle."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import nn

import dreamkit
from dreamkit.card import Card
from dreamkit.errors import ArtifactError, DreamkitError, MissingPath
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.store.artifact import read_artifact, write_artifact
from dreamkit.students import SavedStudent, student_folder
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.weights import hash_weights

FRESH = """
import pickle
import sys

import safetensors.torch
import torch
from torch import nn

def refuse(*args, **kwargs):
    raise AssertionError("pickle was used")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
torch.set_num_threads(1)
import dreamkit

student, inputs, outputs = sys.argv[1:]
model = dreamkit.load_student(student)
assert not model.training
with torch.no_grad():
    logits = model(safetensors.torch.load_file(inputs)["x"])
safetensors.torch.save_file({"logits": logits}, outputs)
print("loaded")
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Return a pruned digits teacher and the folder it is saved in."""
    teacher = BundledTeacher("digits_resnet8").load(0)
    model, pruning_record = teacher.model, PruningRecord()
    for _ in range(2):  # two rounds
        graph = ChannelGraph(model, (1, 8, 8), pruning_record)
        graph.remove({g.name: range(0, g.channels, 4) for g in graph.groups()[0]})
    with torch.no_grad():  # as recovery does
        for parameter in model.parameters():
            parameter.mul_(1.01)
    folder = tmp_path_factory.mktemp("run") / "student"
    write_artifact(folder, model, teacher.card, teacher.builder, pruning_record.to_json())
    return model, folder


def test_a_loaded_student_knows_where_it_comes_from_and_is_pruned_further(pruned, tmp_path):
    _, folder = pruned
    artifact = read_artifact(folder)
    student = dreamkit.load_student(folder)
    assert student.provenance["builder"] == artifact.builder
    assert student.provenance["pruning_record"] == artifact.pruning_record
    pixels = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8)
    further = dreamkit.prune(
        student,
        pixels,
        channels=0.8,
        limits={"chunk": 1},
        recovery={"steps": 1, "batch_size": 8},
        batch_size=8,
        device="cpu",
        progress=False,
    )
    further.save(tmp_path / "further")
    smaller = dreamkit.load_student(tmp_path / "further")
    assert smaller.provenance["builder"] == artifact.builder
    kept = smaller.provenance["pruning_record"]["kept"]
    assert set(artifact.pruning_record["kept"]) <= set(kept)
    assert sum(p.numel() for p in smaller.parameters()) < sum(
        p.numel() for p in student.parameters()
    )


def test_a_student_of_a_network_in_memory_keeps_that_builder(pruned, tmp_path):
    memory = {"source": "memory", "class": "mine.Net"}
    student = dreamkit.load_student(
        edited(copied(pruned, tmp_path), builder=memory), BundledTeacher("digits_resnet8").build
    )
    assert student.provenance["builder"] == memory


def test_a_fresh_process_gives_identical_outputs(pruned, tmp_path):
    model, folder = pruned
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", FRESH, folder, tmp_path / "x.safetensors", tmp_path / "y"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "y")["logits"], expected)


def test_the_pruned_student_is_smaller(pruned):
    model, folder = pruned
    whole = BundledTeacher("digits_resnet8").build()
    # Of 16, 32 and 64 channels go 4, 8, 16 and then a quarter of the rest (3, 6, 12).
    assert (whole.fc.in_features, model.fc.in_features) == (64, 36)
    assert dreamkit.load_student(folder).conv1.weight.shape == (9, 1, 3, 3)


def test_what_lies_on_disk(pruned):
    _, folder = pruned
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "model.safetensors"]
    specification = json.loads((folder / "artifact.json").read_text())
    assert specification["builder"] == {"source": "bundled", "model": "digits_resnet8"}
    artifact = read_artifact(folder)
    assert artifact.card.input_size == (1, 8, 8)
    assert artifact.state["conv1.weight"].shape == (9, 1, 3, 3)


def copied(pruned, tmp_path):
    for path in pruned[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edited(folder, **changes):
    path = folder / "artifact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_damaged_weights(pruned, tmp_path):
    folder = copied(pruned, tmp_path)
    blob = bytearray((folder / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "model.safetensors").write_bytes(blob)
    with pytest.raises(ArtifactError, match=r"model.safetensors is damaged"):
        dreamkit.load_student(folder)


@pytest.mark.parametrize("name", ["artifact.json", "model.safetensors"])
def test_a_missing_file_is_named(pruned, tmp_path, name):
    folder = copied(pruned, tmp_path)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"no {name}"):
        dreamkit.load_student(folder)


def test_no_student_at_all(tmp_path):
    with pytest.raises(ArtifactError, match="holds no student"):
        dreamkit.load_student(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["{", "[]", "{}"], ids=repr)
def test_a_damaged_specification(pruned, tmp_path, text):
    folder = copied(pruned, tmp_path)
    (folder / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read as a student"):
        dreamkit.load_student(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"builder": {"source": "student", "path": "."}}, "its builder is no teacher"),
        ({"builder": ["bundled"]}, "its builder is no teacher"),
        ({"builder": {"source": "bundled", "model": "../../etc"}}, "cannot be used"),
        ({"builder": {"source": "nothing"}}, "cannot be used"),
        (
            {"builder": {"source": "cifar", "model": "resnet20", "num_classes": 10**15}},
            "cannot be used",
        ),
        (
            {"pruning_record": {"grown": {"fc.weight": 10**15}}},
            "no 'fc.weight' with 10{15} outputs",
        ),
        ({"pruning_record": {"grown": {"fc.weight": "many"}}}, "not a record of it"),
        ({"pruning_record": {"grown": {"fc.weight": math.inf}}}, "infinity"),
        ({"pruning_record": {"grown": {"bn1.num_batches_tracked": 5}}}, "0-d tensor"),
        ({"pruning_record": {"kept": {"fc.weight": [[0] * 1000, None]}}}, "should ascend"),
        ({"pruning_record": {"kept": {"fc.weight": [[-1, 0], None]}}}, "should ascend"),
        ({"pruning_record": {"kept": {"fc.weight": [["0"], None]}}}, "should ascend"),
        ({"pruning_record": {"kept": {"nothing": [[0]]}}}, "no tensor 'nothing'"),
        ({"pruning_record": []}, "not a record of it"),
    ],
)
def test_a_specification_that_lies_is_refused_in_no_time(pruned, tmp_path, changes, message):
    folder = edited(copied(pruned, tmp_path), **changes)
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match=message):
        dreamkit.load_student(folder)
    assert time.perf_counter() - start < 5


def test_the_weights_are_a_plain_state_dict(pruned):
    model, folder = pruned
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    again = SavedStudent(str(folder), weights=None).build().eval()
    again.load_state_dict(state)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))


def test_another_format(pruned, tmp_path):
    with pytest.raises(ArtifactError, match="format 1, this version reads 3"):
        dreamkit.load_student(edited(copied(pruned, tmp_path), format=1))


def test_a_record_that_does_not_fit_the_builder(pruned, tmp_path):
    pruning_record = {"kept": {"conv9.weight": [[0], None]}, "attributes": {}}
    with pytest.raises(ArtifactError, match="conv9"):
        dreamkit.load_student(edited(copied(pruned, tmp_path), pruning_record=pruning_record))


def test_weights_that_do_not_fit_the_record(pruned, tmp_path):
    with pytest.raises(DreamkitError, match="does not fit the model"):
        dreamkit.load_student(edited(copied(pruned, tmp_path), pruning_record={}))


def test_an_unknown_builder(pruned, tmp_path):
    builder = {"source": "bundled", "model": "no_such_model"}
    with pytest.raises(ArtifactError, match="its builder cannot be used"):
        dreamkit.load_student(edited(copied(pruned, tmp_path), builder=builder))


def test_a_builder_of_the_callers_own(pruned):
    model, folder = pruned
    loaded = dreamkit.load_student(folder, builder=BundledTeacher("digits_resnet8").build)
    x = torch.ones(2, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_the_artifacts_own_code_runs_only_if_allowed(toys, tmp_path):
    code = tmp_path / "net.py"
    code.write_text(
        "import pathlib\nfrom torch import nn\n\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n\n"
        "def make(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, width))\n"
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    builder = {
        "source": "checkpoint",
        "builder": f"{code}:make",
        "arguments": {"width": 3},
        "input_size": (3, 8, 8),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "num_classes": 3,
    }
    write_artifact(tmp_path / "student", model, toys.card(), builder, {})
    with pytest.raises(ArtifactError, match="allow_builder"):
        dreamkit.load_student(tmp_path / "student")
    assert not (tmp_path / "ran").exists()
    loaded = dreamkit.load_student(tmp_path / "student", allow_builder=True)
    assert (tmp_path / "ran").exists()
    x = torch.ones(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_tied_weights_are_saved(toys, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    write_artifact(tmp_path, model, toys.card(), {}, {})
    state = read_artifact(tmp_path).state
    assert torch.equal(state["0.weight"], state["1.weight"])


# --- a student as a teacher -------------------------------------------------------------------


def test_a_saved_student_is_a_teacher_of_recipes(pruned):
    model, folder = pruned
    teacher = SavedStudent(str(folder)).load(0)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher.model(x), model(x))
    assert not teacher.model.training
    assert teacher.card.trained
    assert teacher.card.weights_sha256 == hash_weights(model)
    assert teacher.builder == {"source": "bundled", "model": "digits_resnet8"}


def test_a_saved_students_architecture_with_random_weights(pruned):
    model, folder = pruned
    given = SavedStudent(str(folder), weights=None)
    made, again, other = (given.load(seed) for seed in (1, 1, 2))
    assert made.model.conv1.weight.shape == model.conv1.weight.shape
    assert torch.equal(made.model.conv1.weight, again.model.conv1.weight)
    assert not torch.equal(made.model.conv1.weight, other.model.conv1.weight)
    assert not made.card.trained
    assert given.build().conv1.weight.shape == model.conv1.weight.shape


def test_a_student_taught_or_cut_further_loads_without_the_first(pruned, tmp_path):
    _, folder = pruned
    teacher = SavedStudent(str(folder)).load(0)
    before = json.dumps(teacher.pruning_record)
    pruning_record = PruningRecord.from_json(teacher.pruning_record)
    graph = ChannelGraph(teacher.model, (1, 8, 8), pruning_record)
    graph.remove({graph.groups()[0][0].name: [0]})
    assert json.dumps(teacher.pruning_record) == before
    where = tmp_path / "again"
    write_artifact(where, teacher.model, teacher.card, teacher.builder, pruning_record.to_json())
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(dreamkit.load_student(where)(x), teacher.model(x))


def test_a_student_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingPath, match="no such student") as caught:
        SavedStudent(str(tmp_path))
    assert caught.value.option == "path"


# --- networks in memory -----------------------------------------------------------------------


class Net(nn.Module):
    """A network that stands in a notebook, and in no source of teachers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv2(self.norm(self.conv1(x)).relu()).mean((2, 3)))


@pytest.fixture
def in_memory(tmp_path):
    """Return a pruned network of a class of one's own, and the folder it is saved in."""
    model = Net().eval()
    graph = ChannelGraph(model, (3, 8, 8))
    graph.remove({"conv1": [0, 3], "conv2": [1]})
    card = Card("notebook", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 2, "tests")
    builder = {"source": "memory", "class": "notebook.Net"}
    write_artifact(tmp_path, model, card, builder, graph.pruning_record.to_json())
    return model, tmp_path


@pytest.mark.parametrize("given", [Net, lambda: Net(), Net()], ids=["class", "function", "module"])
def test_a_network_in_memory_is_loaded_into_what_the_caller_gives(in_memory, given):
    model, folder = in_memory
    again = dreamkit.load_student(folder, builder=given)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))
    assert (again.conv1.out_channels, again.conv2.out_channels) == (4, 3)
    if isinstance(given, nn.Module):
        assert given.conv1.out_channels == 6, "it is the caller's"


def test_a_network_in_memory_cannot_be_built_from_its_name(in_memory):
    _, folder = in_memory
    with pytest.raises(ArtifactError, match=r"\(class notebook.Net\): pass builder=\.\.\."):
        dreamkit.load_student(folder)
    with pytest.raises(ArtifactError, match=r"in memory"):
        SavedStudent(str(folder)).load(0)


def test_the_folder_of_a_run_stands_for_its_student(tmp_path):
    assert student_folder(tmp_path) == tmp_path
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "artifact.json").write_text("{}", encoding="utf-8")
    assert student_folder(tmp_path) == student_folder(tmp_path / "student") == tmp_path / "student"
