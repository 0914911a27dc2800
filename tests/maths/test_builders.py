"""Builders of the user's own: their files' neighbours, what they may do, and their weights."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch

import dreamkit
from dreamkit.errors import ArtifactError, DreamkitError, MissingPath, OptionError
from dreamkit.importing import import_file
from dreamkit.store.artifact import write_artifact
from dreamkit.students import SavedStudent
from dreamkit.teachers.checkpoint import CheckpointTeacher

CARD = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": 3}
BLOCKS = """
from torch import nn

WIDTH = {width}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(WIDTH, 3))
"""
EARLY = "from blocks import Net\n\n\ndef make():\n    return Net()\n"
LATE = "def make():\n    import blocks\n    from blocks import Net\n    return blocks.Net()\n"
RELATIVE = "from .blocks import Net\n\n\ndef make():\n    return Net()\n"


def teacher(builder, **options):
    return CheckpointTeacher(builder=str(builder), **CARD, **options)


@pytest.fixture
def code(tmp_path):
    """Return a function that writes a builder's file and returns the reference to its make."""

    def write(text, name="net.py", function="make"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:{function}"

    return write


# --- neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [EARLY, LATE, RELATIVE], ids=["early", "late", "relative"])
def test_two_projects_files_of_one_name_do_not_meet(code, text):
    before = list(sys.path)
    models = []
    for project, width in (("old", 4), ("new", 2)):
        code(BLOCKS.format(width=width), f"{project}/blocks.py")
        models.append(teacher(code(text, f"{project}/model.py")))
    for source, width in zip([*models, *models], [4, 2, 4, 2], strict=True):
        model = source.build()
        assert model[0].out_channels == width
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is type(model)
    assert sys.path == before
    assert "blocks" not in sys.modules


def test_a_file_of_a_package_is_a_module_of_it(code):
    code("", "pkg/__init__.py")
    code("", "pkg/nets/__init__.py")
    code(BLOCKS.format(width=4), "pkg/blocks.py")
    made = RELATIVE.replace(".blocks", "..blocks") + "\n\nfrom pkg.blocks import WIDTH\n"
    assert teacher(code(made, "pkg/nets/model.py")).build()[0].out_channels == 4


def test_a_module_is_found_in_the_working_folder_and_later_from_elsewhere(
    code, tmp_path, monkeypatch
):
    code("", "my_package/__init__.py")
    code(BLOCKS.format(width=4), "my_package/blocks.py")
    code(EARLY.replace("blocks", "my_package.blocks"), "my_package/models.py")
    monkeypatch.chdir(tmp_path)
    builder = teacher("my_package.models:make").load(0).builder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert teacher(builder["builder"]).build()[0].out_channels == 4
    with pytest.raises(DreamkitError, match=r"No module named.*working folder.*PYTHONPATH"):
        teacher("my_package.models:make").build()


def test_installed_and_standard_modules_come_before_what_only_has_their_name(code, tmp_path):
    code("raise AssertionError", "types.py")
    (tmp_path / "torch" / "logs").mkdir(parents=True)
    text = "from types import SimpleNamespace\nimport torch, dreamkit.card as card\n"
    module = import_file(code(text).rpartition(":")[0])
    assert module.torch is torch
    assert module.card is sys.modules["dreamkit.card"]


def test_a_changed_neighbour_is_run_anew(code):
    code(BLOCKS.format(width=4), "blocks.py")
    reference = code(EARLY)
    assert teacher(reference).build()[0].out_channels == 4
    code(BLOCKS.format(width=16), "blocks.py")
    assert teacher(reference).build()[0].out_channels == 16


def test_networks_of_such_files_are_compiled(code):
    code(BLOCKS.format(width=4), "blocks.py")
    model = teacher(code(EARLY)).build().eval()
    x = torch.ones(1, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


# --- what a builder may do --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(width):\n    pass\n", r"missing a required argument: 'width'.*arguments: \{"),
        ("def make():\n    return 1, 2\n", r"returned tuple \(int, int\), not a module"),
        ("import sys\n\n\ndef make():\n    sys.exit(0)\n", r"failed: SystemExit.*line 5"),
        ("import sys\nsys.exit(0)\n", "cannot be imported: SystemExit"),
        ("def make(:\n", r"SyntaxError: .*net.py, line 1"),
        ("import nowhere_at_all\n", r"No module named 'nowhere_at_all'.*PYTHONPATH"),
        ("def make():\n    return open('gone.pth')\n", r"gone.pth.*net.py, line 2"),
        ("def other():\n    pass\n", r"no function 'make' \(it has other\)"),
    ],
)
def test_what_goes_wrong_in_a_builder_is_told_with_its_line(code, text, message):
    with pytest.raises(DreamkitError, match=message):
        teacher(code(text)).load(0)


def test_what_a_builder_prints_is_not_on_stdout_and_a_class_is_one(code, capsys):
    code(BLOCKS.format(width=4), "blocks.py")
    reference = code("print('hello')\nfrom blocks import Net\n", function="Net")
    assert teacher(reference).build()[0].out_channels == 4
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize("builder", ["net.py", "nets/net:make", "net.ipynb:make"])
def test_references_that_are_none(builder):
    with pytest.raises(OptionError, match=r"path/file\.py:function"):
        teacher(builder)


def test_a_windows_path_is_told():
    with pytest.raises(MissingPath, match="written with '/'"):
        teacher(r"C:\nets\net.py:make")


def test_one_logit_is_refused_with_the_way_out(code):
    with pytest.raises(OptionError, match=r"torch.cat\(\[-x, x\], 1\) / 2"):
        CheckpointTeacher(builder=code(EARLY), **CARD | {"num_classes": 1})


# --- weights that come with it ----------------------------------------------------------------


CACHED = BLOCKS.format(width=4) + "\nONE = Net()\n\n\ndef make():\n    return ONE\n"
SEEDED = """
def make():
    import torch
    net = Net()
    with torch.no_grad():
        for number, weight in enumerate([*net.parameters()][:{count}]):
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    return net
"""


def test_one_object_is_returned_as_copies(code):
    source = teacher(code(CACHED))
    first, second = source.build(), source.build()
    assert first is not second
    assert first[0].weight is not second[0].weight


@pytest.mark.parametrize(
    ("text", "trained", "origin"),
    [
        (SEEDED.format(count=99), True, "the builder's own weights"),
        ("\n\ndef make():\n    return Net()\n", False, "random weights"),
        (SEEDED.format(count=2), False, "the builder's own weights, but random ones in 4"),
    ],
    ids=["own", "random", "in part"],
)
def test_weights_of_the_builder_are_told_from_random_ones(code, text, trained, origin):
    loaded = teacher(code(BLOCKS.format(width=4) + text)).load(0)
    assert (loaded.card.trained, loaded.card.origin) == (trained, origin)
    assert any("new random weights of 4" in note for note in loaded.notes) is ("but" in origin)


UNUSED = """
class Half(nn.Module):
    def __init__(self):
        import torch
        super().__init__()
        self.net, self.unused = Net(), nn.Linear(2, 2)
        for weight in self.net.parameters():
            weight.data.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))

    def train(self, mode=True):
        super().train(mode)  # and returns nothing

    def forward(self, x):
        return {"logits": self.net(x)}


def make():
    return Half()
"""


def test_random_weights_that_have_no_effect_do_not_make_a_network_untrained(code):
    loaded = teacher(code(BLOCKS.format(width=4) + UNUSED)).load(0)
    assert loaded.card.trained
    assert any("new random weights of unused" in note for note in loaded.notes)


# --- students ---------------------------------------------------------------------------------


@pytest.fixture
def student(code, tmp_path, monkeypatch):
    """Return the folder of a student whose builder was a relative path."""
    code(BLOCKS.format(width=4), "here/blocks.py")
    code(EARLY, "here/net.py")
    monkeypatch.chdir(tmp_path / "here")
    made = teacher("net.py:make").load(0)
    folder = tmp_path / "here" / "out" / "student"
    write_artifact(folder, made.model, made.card, made.builder, {})
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_student_loads_from_another_folder_and_when_all_was_moved(student, tmp_path):
    assert dreamkit.load_student(student, allow_builder=True)[0].out_channels == 4
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "out" / "student"
    assert dreamkit.load_student(moved, allow_builder=True)[0].out_channels == 4
    assert SavedStudent(str(moved), allow_builder=True).build()[0].out_channels == 4


def test_what_is_missing_is_told_in_the_words_of_the_door(student, invoke):
    given = "path/to/file.py:function"
    with pytest.raises(ArtifactError, match=r"pass allow_builder=True, or pass builder=\.\.\."):
        dreamkit.load_student(student)
    with pytest.raises(ArtifactError, match=f"write allow_builder: true, .* builder: {given}"):
        SavedStudent(str(student)).build()
    code, _, err = invoke("export", student)
    assert code == 2
    assert f"pass --allow-builder, or pass --builder {given}" in err
    file = student.parents[1] / "net.py"
    file.rename(file.with_name("net2.py"))
    code, _, err = invoke("export", student, "--allow-builder")
    assert code == 2
    assert f"{file}:make, and there is no such file" in err
    assert "nor a net.py beside the student" in err
    code, _, err = invoke(
        "export",
        student,
        "--format",
        "torchscript",
        "--builder",
        f"{file.with_name('net2.py')}:make",
    )
    assert (code, err) == (0, "")
    assert SavedStudent(str(student), builder=f"{file.with_name('net2.py')}:make").build()
