"""What users get wrong: one message with the place and the fix, exit status 2, nothing left behind.

Every case goes through the command line.
"""

from __future__ import annotations

import os
import pickle
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from dreamkit.devices import choose_device
from dreamkit.errors import DreamkitError
from dreamkit.store.dreams import DreamStore
from dreamkit.types import StoredImages

Invoke = Callable[..., Any]
Write = Callable[..., Path]
Tree = dict[str, bytes | None]

NETS = """\
from torch import nn


def with_bn(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )


def without_bn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def broken():
    raise ValueError("no such luck")


def no_module():
    return {}
"""


def tree(folder: Path) -> Tree:
    """Return every file of a folder with its bytes, and every folder in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def refused(invoke: Invoke, tmp_path: Path) -> Callable[..., str]:
    """Run a recipe that must be refused; return the message."""

    def run(path: Path, *arguments: object, out: Path | None = None) -> str:
        before = tree(tmp_path)
        code, _, err = invoke("run", path, "--out", out or tmp_path / "out", *arguments)
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert tree(tmp_path) == before
        message: str = err.removeprefix("error: ").rstrip("\n")
        return message

    return run


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Return the tiny recipe with a teacher from ``nets.py`` and, where given, a checkpoint."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(builder: str = "with_bn", **options: Any) -> dict[str, Any]:
        (tmp_path / "nets.py").write_text(NETS)
        tiny["teacher"] = {
            "source": "checkpoint",
            "builder": f"{tmp_path / 'nets.py'}:{builder}",
            "input_size": [1, 8, 8],
            "mean": [0.5],
            "std": [0.5],
            "num_classes": 10,
            **options,
        }
        return tiny

    return make


def small_net() -> nn.Module:
    """Return what ``nets.with_bn`` builds."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


# The recipe itself


@pytest.mark.parametrize(
    ("text", "place", "parts"),
    [
        ("sede: 1", "1:1 sede: ", ["unknown option", "did you mean 'seed'?"]),
        ("seed: '1'", "1:7 seed: ", ["should be a valid integer", "'1'"]),
        ("device: tpu", "1:9 device: ", ["'tpu'"]),
        (
            "evaluation: {source: foldr, path: x}",
            "1:22 evaluation.source: ",
            ["no source 'foldr'", "did you mean 'folder'?"],
        ),
        (
            "evaluation: {source: folder, path: no/such/folder}",
            "1:36 evaluation.path: ",
            ["no such folder: no/such/folder"],
        ),
        ("latency: {name: torch_cpu}", "1:17 latency.name: ", ["did you mean 'torch-cpu'?"]),
        ("trackers: {name: csv}", "1:11 trackers: ", ["should be a list, not a mapping"]),
        ("name: again", ":1 the key 'name' stands twice", ["it was first at "]),
        ("description: !!python/object:os.system {}", "1:14 the tag ", ["!!python/object:os"]),
        ("description: !!python/object/apply:os.system [id]", "1:14 the tag ", ["not allowed"]),
        ("description: [1", " not valid YAML: ", ["expected ',' or ']'"]),
    ],
)
def test_a_line_that_is_wrong(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    text: str,
    place: str,
    parts: list[str],
) -> None:
    rest = recipe_file(tiny).read_text()
    if text.startswith("device"):
        rest = rest.replace("device: cpu\n", "")
    path = recipe_file(f"{text}\n{rest}")
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert place in message
    assert all(part in message for part in parts)
    assert "\n" not in message


def test_a_negative_weight(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    tiny["synthesis"]["regularizers"][0]["weight"] = -0.5
    path = recipe_file(tiny)
    assert refused(path) == (
        f"{path}:14:13 synthesis.regularizers[0].weight: should be a finite number >= 0 (got -0.5)"
    )


def test_no_images(refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]) -> None:
    tiny["synthesis"]["images"] = 0
    path = recipe_file(tiny)
    expected = f"{path}:8:11 synthesis.images: should be greater than or equal to 1 (got 0)"
    assert refused(path) == expected


@pytest.mark.parametrize(
    ("options", "option", "said"),
    [
        ("{pattern: 2-4}", "pattern", "should be N:M, of every M weights N stay, such as 2:4"),
        ("{pattern: 4:2}", "pattern", "'4:2' would keep 4 of every 2 weights"),
        ("{pattern: 2:0}", "pattern", "'2:0' would keep 2 of every 0 weights"),
        ("{pattern: 2:4, sparsity: 0.5}", "pattern", "set it or 'sparsity'"),
        ("{rounds: 1}", "sparsity", "set 'sparsity' or 'pattern'"),
        ("{pattern: 2:4, rounds: 3, reconstruction: {}}", "rounds", "set 2 or less"),
        (
            "{pattern: 2:7}",
            "pattern",
            "no layer can have 2:7: conv1: inputs (1) are no multiple of 7",
        ),
    ],
)
def test_what_is_no_pattern_of_zeros_or_fits_no_layer(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    options: str,
    option: str,
    said: str,
) -> None:
    recipe = recipe_file(tiny).read_text().replace("name: synthesize", "name: recover")
    found = refused(recipe_file(recipe), "--set", f"application={options}")
    assert f" application.{option}: " in f" {found}"
    assert said in found


def test_an_unknown_preset(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    path = recipe_file({**tiny, "presets": {"smoke": {"seed": 1}}})
    expected = f"{path}: no preset 'smok'; did you mean 'smoke'? (presets: smoke)"
    assert refused(path, "--preset", "smok") == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("synthesis.imags=3", ["--set synthesis.imags: ", "did you mean 'images'?"]),
        ("synthesis.stages[4].steps=3", ["--set synthesis.stages[4].steps: ", "a list of 1"]),
        # 'seed' is not written in the recipe, so the override makes a mapping of it.
        ("seed.x=3", ["--set seed.x seed", "should be a valid integer"]),
        ("seed", ["--set seed: ", "path=value"]),
        ("name.x=3", ["--set name.x: ", "leads into a string"]),
    ],
)
def test_an_unknown_override(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    override: str,
    parts: list[str],
) -> None:
    message = refused(recipe_file(tiny), "--set", override)
    assert all(part in message for part in parts)


def test_a_missing_recipe(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refused(path) == f"{path}: cannot be read: No such file or directory"


def test_a_device_that_torch_does_not_see(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    path = recipe_file({**tiny, "device": "cuda:7"})
    assert refused(path) == f"{path}:2:9 device: torch sees no device 'cuda:7'; use auto or cpu"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_its_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.cuda.set_device refuses a device without one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(name) == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "CPU", "cpu:0"])
def test_a_device_that_is_none_is_refused_from_python_too(name: str) -> None:
    with pytest.raises(DreamkitError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device: should be auto, cpu, cuda, cuda:N or mps (got '{name}')"


def test_a_device_may_be_torchs() -> None:
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    path = recipe_file({**tiny, "device": "cuda"})
    assert refused(path) == f"{path}:2:9 device: torch sees no device 'cuda'; use auto or cpu"


def test_a_device_number_beyond_any_machine(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    path = recipe_file({**tiny, "device": "cuda:99999999999999999999"})
    assert refused(path).startswith(f"{path}:2:9 device: ")


# The teacher


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_pickles_code(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    form: str,
) -> None:
    weights, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"state_dict": small_net().state_dict(), "extra": Evil(marker)}
    if form == "pickle":
        weights.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, weights, _use_new_zipfile_serialization=form == "zip")
    path = recipe_file(checkpoint(path=str(weights), key="state_dict"))
    message = refused(path)
    assert not marker.exists()
    assert str(weights) in message
    assert "run" in message.partition(str(weights))[2]
    assert "torch.save" in message
    # The file is as dangerous as it looks: the marker is what an unsafe load leaves.
    if form == "pickle":
        pickle.loads(weights.read_bytes())
    else:
        torch.load(weights, weights_only=False)
    assert marker.exists()


def test_a_state_dict_that_does_not_fit(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    weights = tmp_path / "w.pth"
    state = small_net().state_dict()
    state["4.weight"] = torch.zeros(3, 4)
    torch.save({f"module.{key}": value for key, value in state.items() if "1." not in key}, weights)
    message = refused(recipe_file(checkpoint(path=str(weights))))
    assert f"{weights} does not fit the model: 4 missing: 1.weight, " in message  # no 'module.'
    message = refused(recipe_file(checkpoint(path=str(weights), prefix="module.")))
    assert "4 missing: 1.weight, 1.bias, 1.running_mean, 1.running_var;" in message
    assert "1 of other shape: 4.weight (3, 4), model has (10, 4)" in message


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("model", ["no key 'model'", "it holds: state_dict, epoch"]),
        ("state_dict.net", ["no key 'net' (of key: state_dict.net)", "0.weight"]),
        ("epoch", ["not a state dict"]),
    ],
)
def test_a_wrong_key_of_a_checkpoint(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    key: str | None,
    parts: list[str],
) -> None:
    weights = tmp_path / "w.pth"
    torch.save({"state_dict": small_net().state_dict(), "epoch": 3}, weights)
    message = refused(recipe_file(checkpoint(path=str(weights), key=key)))
    assert f"{weights}: " in message
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b""),
        ("w.pth", b"hello world, this is text"),
        ("w.pth", b"PK\x03\x04 cut off"),
        ("w.pth", b"\x80\x02}q\x00(X"),
        ("w.safetensors", b"hello"),
        ("w.safetensors", b""),
    ],
)
def test_a_checkpoint_that_is_damaged(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    name: str,
    content: bytes,
) -> None:
    weights = tmp_path / name
    weights.write_bytes(content)
    message = refused(recipe_file(checkpoint(path=str(weights))))
    said = message.partition(str(weights))[2]
    assert len(said) > 20
    assert any(
        word in said for word in ("empty", "damaged", "cut short", "pickle", "cannot be read")
    )


def test_a_missing_checkpoint(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = recipe_file(checkpoint(path=str(tmp_path / "none.pth")))
    message = refused(path)
    assert message.startswith(f"{path}:15:9 teacher.path: no such file: {tmp_path / 'none.pth'}")


@pytest.mark.parametrize(
    ("builder", "parts"),
    [
        ("nets.py:nope", ["nets.py has no function 'nope'"]),
        ("nets.py:broken", ["failed: ValueError: no such luck"]),
        ("nets.py:no_module", ["returned dict, not a module"]),
        ("none.py:f", ["no such file: none.py"]),
        ("no_such_package.nets:f", ["cannot be imported", "no_such_package"]),
        ("nets.py", ["write package.module:function or path/file.py:function"]),
        ("syntax.py:f", ["cannot be imported", "SyntaxError"]),
    ],
)
def test_a_bad_builder(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builder: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syntax.py").write_text("def f(:\n")
    recipe = checkpoint()
    recipe["teacher"]["builder"] = builder
    path = recipe_file(recipe)
    message = refused(path)
    assert message.startswith(f"{path}:5:12 teacher.builder: ")
    assert all(part in message for part in parts)


def test_a_bad_builder_of_a_student_is_placed_at_the_student(
    invoke: Invoke,
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    recipe = checkpoint("broken")
    recipe["application"] = {"name": "distill", "student": recipe["teacher"]}
    recipe["teacher"] = {"source": "bundled", "model": "digits_resnet8"}
    path = recipe_file(recipe)
    code, _, err = invoke("run", path, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"error: {path}:")
    assert " application.student.builder: the builder " in err


@pytest.mark.parametrize(
    ("application", "part"),
    [
        ({"name": "distill", "student": "broken"}, "no such luck"),
        ({"name": "distill", "student": "with_bn", "images": "empty"}, "class folder"),
        ({"name": "prune", "limits": {"chunk": 999}}, "can be pruned"),
        (
            {"name": "prune", "limits": {"exceptions": [{"layers": "layer9.*", "max_ratio": 0}]}},
            "application.limits.exceptions[0].layers: no layer that makes channels fits 'layer9.*'",
        ),
    ],
)
def test_an_application_that_cannot_start_leaves_no_run_behind(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    application: dict[str, Any],
    part: str,
) -> None:
    # A folder left behind would refuse the mended recipe: it 'holds the run of another recipe'.
    images = tmp_path / "images"
    images.mkdir()
    if "student" in application:
        application = {**application, "student": checkpoint(application["student"])["teacher"]}
    else:
        application = {**application, "criteria": [{"name": "taylor"}], "target": {"flops": 0.5}}
    if "images" in application:
        application["images"] = {"source": "folder", "path": str(images)}
    recipe = checkpoint()
    recipe["teacher"] = {"source": "bundled", "model": "digits_resnet8"}
    assert part in refused(recipe_file({**recipe, "application": application}))


def test_a_teacher_without_batch_norm(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
) -> None:
    recipe = checkpoint("without_bn", path=None)
    recipe["synthesis"]["regularizers"].append({"name": "bn_feature"})
    path = recipe_file(recipe)
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert " synthesis.regularizers[1]: bn_feature matches BatchNorm statistics" in message
    assert "leave the term out (DeepDream: tv and l2)" in message
    assert "{source: folder, path: ...}" in message


def test_the_same_teacher_dreams_without_the_term(
    invoke: Invoke,
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = recipe_file(checkpoint("without_bn", path=None))
    assert invoke("run", path, "--out", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"num_classes": 12}, "teacher"),
        ({"num_classes": 5}, "teacher"),
        ({"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}, "teacher"),
        ({"input_size": [1, 0, 0]}, "teacher"),
        ({"std": [0.0]}, "teacher"),
        ({"class_names": ["a", "b"]}, "teacher.class_names"),
        ({"class_names": "no/such/names.txt"}, "teacher.class_names"),
        ({"mean": [0.5, 0.5]}, "teacher"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    options: dict[str, Any],
    place: str,
) -> None:
    path = recipe_file(checkpoint(**options))
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert f" {place}" in message


def test_labels_that_the_teacher_does_not_have(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    tiny["synthesis"]["labels"] = [3, 11]
    message = refused(recipe_file(tiny))
    assert " synthesis.labels: label 11 is none of the teacher's 10 classes (0 to 9)" in message


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_weights_that_cannot_be_downloaded(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    monkeypatch.setattr("timm.create_model", offline)
    path = recipe_file({**tiny, "teacher": {"source": source, "model": "resnet18"}})
    message = refused(path)
    assert message.startswith(f"{path}:4:3 teacher.weights: ")
    assert "could not be downloaded" in message
    assert "Name or service not known" in message
    lines = message.split("\n")
    assert [line.strip()[:2] for line in lines[1:]] == ["1.", "2.", "3."]
    assert "HTTPS_PROXY" in lines[1]
    assert ".safetensors" in lines[2]
    assert "--set teacher.weights=null" in lines[3]


# Evaluation images


@pytest.mark.parametrize("inside", [[], ["one", "two"]])
def test_an_image_folder_without_images(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    inside: list[str],
) -> None:
    images = tmp_path / "images"
    for name in ["", *inside]:
        (images / name).mkdir()
    message = refused(
        recipe_file({**tiny, "evaluation": {"source": "folder", "path": str(images)}})
    )
    assert f"{images}: " in message


def test_scikit_learn_is_missing(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = refused(recipe_file({**tiny, "evaluation": {"source": "digits"}}))
    assert "'sklearn', which is not installed" in message
    assert 'pip install "dreamkit[demo]"' in message


def test_evaluation_on_the_runs_own_dreams(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any]
) -> None:
    path = recipe_file({**tiny, "evaluation": {"source": "dreams"}})
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert " evaluation" in message


@pytest.mark.parametrize("joined", [False, True])
def test_dreams_of_another_teacher(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    invoke: Invoke,
    tmp_path: Path,
    joined: bool,
) -> None:
    content = StoredImages(torch.zeros(4, 1, 8, 8).byte(), torch.arange(4), torch.zeros(4, 10))
    settings = {"seed": 0, "teacher_sha256": "0123456789abcdef", "synthesis": None}
    DreamStore(tmp_path / "theirs", settings).write(0, content, 1.0, 1.0, {})
    source: dict[str, Any] = {"source": "dreams", "path": str(tmp_path / "theirs")}
    images = {"source": "joined", "of": [source]} if joined else source
    application = {"name": "recover", "sparsity": 0.5, "images": images, "training": {"steps": 1}}
    recipe = {**tiny, "application": application}
    recipe.pop("synthesis", None)
    message = refused(recipe_file(recipe))
    assert "application.images" in message
    assert "the dreams are of another network (weights 0123456789ab...)" in message
    assert "allow_foreign: true" in message
    source["allow_foreign"] = True
    done = invoke("run", recipe_file(recipe), "--dry-run", "--out", tmp_path / "out")
    assert done.code == 0, done.err


def test_digits_for_a_teacher_of_another_size(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
) -> None:
    recipe = checkpoint(input_size=[1, 16, 16])
    recipe["evaluation"] = {"source": "digits"}
    assert "digits are (1, 8, 8), checkpoint/" in refused(recipe_file(recipe))


@pytest.mark.parametrize("case", ["state dict", "key", "images", "sklearn", "digits"])
def test_what_only_loading_finds_has_its_place_in_the_recipe_too(
    refused: Callable[..., str],
    recipe_file: Write,
    checkpoint: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    weights, images = tmp_path / "w.pth", tmp_path / "images"
    images.mkdir()
    torch.save({"0.weight": torch.zeros(1)}, weights)
    recipe, place = checkpoint(), "evaluation"
    if case in {"state dict", "key"}:
        recipe = checkpoint(path=str(weights), key="nope" if case == "key" else None)
        place = "teacher"
    elif case == "images":
        recipe["evaluation"] = {"source": "folder", "path": str(images)}
    else:
        recipe = checkpoint(input_size=[1, 16, 16]) if case == "digits" else recipe
        recipe["evaluation"] = {"source": "digits"}
        if case == "sklearn":
            monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    path = recipe_file(recipe)
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert f" {place}" in message.partition(": ")[0]


# The run directory


def test_a_folder_that_holds_another_recipes_run(
    refused: Callable[..., str],
    invoke: Invoke,
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
) -> None:
    path, out = recipe_file(tiny), tmp_path / "out"
    assert invoke("run", path, "--out", out).code == 0
    message = refused(path, "--set", "seed=9")
    assert message.startswith(f"{out} already holds the run of another recipe")
    assert "choose another folder with --out" in message
    assert "already holds the run of another recipe" in refused(path, "--set", "seed=9", "--resume")


def test_a_folder_that_is_not_empty_and_no_run(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("precious")
    expected = f"{out} is not empty and not a run; choose another folder with --out"
    assert refused(recipe_file(tiny), out=out) == expected


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_output_at_or_below_a_regular_file(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    name: str,
) -> None:
    (tmp_path / "file").write_text("precious")
    message = refused(recipe_file(tiny), out=tmp_path / name)
    assert message.startswith(f"{tmp_path / name} ")
    assert "--out" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_below_a_read_only_folder(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any], tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    try:
        message = refused(recipe_file(tiny), out=locked / "out")
    finally:
        locked.chmod(0o700)
    assert f"{locked / 'out'} cannot be made: Permission denied" in message


@pytest.mark.parametrize("method", ["mkdir", "open"])
def test_output_that_may_not_be_written(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    path, out = recipe_file(tiny), tmp_path / "deep" / "out"
    real = getattr(Path, method)

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        writing = method == "mkdir" or "w" in "".join(map(str, arguments))
        if writing and (self == out or out in self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, method, denied)
    message = refused(path, out=out)
    assert message.startswith(str(out))
    assert "Permission denied" in message
    assert "choose another folder" in message


@pytest.mark.parametrize("made", [False, True])
def test_nothing_to_resume(
    refused: Callable[..., str],
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    made: bool,
) -> None:
    out = tmp_path / "out"
    if made:
        out.mkdir()
    expected = f"{out} holds no run to resume; leave --resume out to start one"
    assert refused(recipe_file(tiny), "--resume") == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.resolved.yaml", b"\xff\xfe"),
        ("report.json", b"{"),
        ("report.json", b"\xff\xfe"),
        ("report.json", b"[]"),
    ],
)
def test_a_run_directory_that_is_damaged(
    refused: Callable[..., str],
    invoke: Invoke,
    recipe_file: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    name: str,
    content: bytes,
) -> None:
    path, out = recipe_file(tiny), tmp_path / "out"
    assert invoke("run", path, "--out", out).code == 0
    (out / name).write_bytes(content)
    assert str(out) in refused(path)


@pytest.mark.parametrize("file", ["", "..", "report.json", "recipe.resolved.yaml", "log.jsonl"])
def test_a_tracker_that_would_write_over_the_run(
    refused: Callable[..., str], recipe_file: Write, tiny: dict[str, Any], file: str
) -> None:
    path = recipe_file({**tiny, "trackers": [{"name": "csv", "file": file}]})
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert " trackers[0].file: " in message


def test_a_competition_without_a_student_names_what_would_supply_one(
    tiny: dict[str, Any], recipe_file: Write, invoke: Invoke
) -> None:
    tiny["synthesis"]["regularizers"] = [{"name": "js_compete", "weight": 1}]
    done = invoke("validate", str(recipe_file(tiny)))
    assert done.code == 2
    assert "synthesis: js_compete needs a student: an application" in done.err
    assert "or the option 'student'" in done.err
