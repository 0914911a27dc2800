"""The script that trains teachers for CIFAR: its mechanics, on sixteen tiny pictures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from PIL import Image

from dreamkit.card import Card
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.cifar import CifarTeacher
from dreamkit.types import StoredImages

CLASSES = ("bird", "cat")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("train_teacher")
    torch.set_num_threads(before)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Reddish birds and greenish cats, as PNG files of 8×8."""
    noise = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 3)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(40, (8, 8, 3), generator=noise, dtype=torch.uint8)
                pixels[..., number] += 200
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def train(script: ModuleType, pictures: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script on the pictures; return the folder that it writes into."""

    def run(*options: str, out: str = "out") -> Path:
        folder = tmp_path / out
        given = ("--train", str(pictures / "train"), "--test", str(pictures / "test"))
        tiny = ("--model", "wrn_16_1", "--size", "8", "--batch-size", "5", "--epochs", "2")
        script.main([*given, *tiny, "--precision", "float32", "--out", str(folder), *options])
        return folder

    return run


def state(folder: Path, stem: str = "wrn_16_1") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"{stem}.safetensors")


def test_what_is_written_is_a_teacher(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("--json", str(tmp_path / "figures.json"), "--evaluate-every", "1")
    assert {path.name for path in folder.iterdir()} == {"wrn_16_1.safetensors", "wrn_16_1.json"}
    teacher = CifarTeacher("wrn_16_1", str(folder / "wrn_16_1.safetensors")).load(0)
    card = teacher.card
    assert (card.input_size, card.class_names, card.trained) == ((3, 8, 8), CLASSES, True)
    assert card.mean[2] == pytest.approx(19.5 / 255, abs=0.01)  # blue: 0 to 39 in both classes
    assert card.std[2] == pytest.approx(39 / 12**0.5 / 255, abs=0.01)
    notes = card.notes
    assert (notes["images"], notes["test_images"], notes["epochs"]) == (16, 6, 2)
    assert notes["data"] == "pictures/train"
    assert str(tmp_path) not in json.dumps(card.to_json()), "no path of the machine"
    assert "--train train --test test --model wrn_16_1" in notes["command"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [sorted(epoch) for epoch in figures["history"]] == [["loss", "test_accuracy"]] * 2
    assert figures["history"][-1]["test_accuracy"] == pytest.approx(
        notes["test_accuracy"], abs=1e-4
    )
    assert "| wrn_16_1 | 16 | " in capsys.readouterr().out


OTHER = ("--optimizer", "adamw", "--augmentation", "strong", "--mixup", "0.8", "--lr", "0.01")
MUON = ("--optimizer", "muon", "--lr", "0.01")


@pytest.mark.parametrize("how", [(), OTHER, MUON], ids=["sgd", "adamw, strong, mixed", "muon"])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    script: ModuleType,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: tuple[str, ...],
) -> None:
    whole = state(train(*how))
    save = script.Training.save

    def save_and_stop(training: object, path: Path) -> None:
        save(training, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Training, "save", save_and_stop)
    with pytest.raises(SystemExit) as stopped:
        train(*how, out="parts")
    monkeypatch.setattr(script.Training, "save", save)
    assert stopped.value.code == 130
    with pytest.raises(SystemExit) as refused:
        train(*how, "--epochs", "3", out="parts")
    assert refused.value.code == 2
    assert "with epochs 2, not 3: give its settings" in capsys.readouterr().err
    folder = train(*how, out="parts")
    assert "going on after epoch 1" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"wrn_16_1.safetensors", "wrn_16_1.json"}
    parts = state(folder)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(whole["fc.weight"], state(train(*how, "--seed", "1"))["fc.weight"])


def test_mixed_images_have_the_labels_of_their_pixels(script: ModuleType) -> None:
    mixed = importlib.import_module("supervised_training").mixed
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    kinds = set()
    for _ in range(12):
        images, wanted = mixed(x, torch.eye(4), 0.8, generator)
        assert wanted.sum(1).tolist() == pytest.approx([1.0] * 4)
        told = (wanted * torch.arange(4.0)).sum(1)  # each image has its number as its level
        assert images.mean((1, 2, 3)).tolist() == pytest.approx(told.tolist(), abs=1e-5)
        kinds.add(bool((images.flatten(1).std(1) > 1e-3).any()))
    assert kinds == {True, False}, "mixup leaves images flat, CutMix does not"
    assert x[0].max() == 0, "the images given are left alone"


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_muon_makes_all_directions_of_a_step_as_long(
    script: ModuleType, shape: tuple[int, int]
) -> None:
    muon = importlib.import_module("muon")
    matrix = torch.nn.Parameter(torch.zeros(shape))
    bias = torch.nn.Parameter(torch.zeros(3))
    steep = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    steep += 50 * torch.ones(shape)  # nearly of rank 1
    optimizer = muon.Muon([matrix, bias], lr=0.1, weight_decay=0.0)
    matrix.grad, bias.grad = steep, torch.tensor([1.0, -9.0, 0.0])
    optimizer.step()
    assert bias.detach().tolist() == pytest.approx([-0.1, 0.1, 0.0]), "AdamW's first step"
    moved = torch.linalg.svdvals(matrix.detach()) / (0.1 * 0.2 * 40**0.5)
    assert 0.6 < float(moved.min()) <= float(moved.max()) < 1.25
    assert float((matrix.detach() * steep).sum()) < 0, "downhill"


def test_patches_are_dropped_until_the_last_epochs(
    script: ModuleType, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = script.Training.run_epoch

    def count(training: object, *arguments: object) -> float:
        blocks: list[int] = []
        block = training.model.blocks[0]
        hook = block.register_forward_pre_hook(lambda _, x: blocks.append(x[0].shape[1]))
        loss = run(training, *arguments)
        hook.remove()
        seen.append(set(blocks))
        return loss

    monkeypatch.setattr(script.Training, "run_epoch", count)
    train("--model", "vit", "--patch-dropout", "0.5", "--optimizer", "muon", "--lr", "1e-3")
    assert seen == [{1 + 2}, {1 + 2}], "of two epochs none is in the last fifth"
    seen.clear()
    five = ("--epochs", "5", "--evaluate-every", "5")
    train("--model", "vit", "--patch-dropout", "0.5", "--lr", "1e-3", *five, out="five")
    assert seen == [{3}] * 4 + [{1 + 4}]


def test_bundled_weights_are_halves_and_are_those_that_were_judged(
    train: Callable[..., Path],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(script, "PACKAGE_FOLDER", tmp_path / "package")
    (tmp_path / "package").mkdir()
    own, bundled = state(train("--bundle", "small")), state(tmp_path / "package", "small")
    assert {v.dtype for v in bundled.values() if v.is_floating_point()} == {torch.float16}
    assert {v.dtype for v in own.values() if v.is_floating_point()} == {torch.float32}
    assert all(torch.equal(value.float(), own[name].float()) for name, value in bundled.items())


def test_a_bundled_teacher(
    script: ModuleType,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "package"
    (package / "weights").mkdir(parents=True)
    monkeypatch.setattr(script, "PACKAGE_FOLDER", package / "weights")
    monkeypatch.setattr("dreamkit.teachers.bundled.resources.files", lambda name: package)
    folder = train("--bundle", "tiny", "--epochs", "1")
    teacher = BundledTeacher("tiny").load(0)
    assert teacher.card.name == "bundled/tiny"
    assert torch.equal(teacher.model.state_dict()["fc.weight"], state(folder)["fc.weight"])


def test_a_network_without_patches_has_none_to_drop(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("--patch-dropout", "0.5")
    assert "wrn_16_1 takes no patches to drop: omit --patch-dropout" in capsys.readouterr().err


def test_torchvisions_data_sets(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Few:
        """Five pictures of each class of CIFAR-10's shape, the test split darker."""

        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.classes = [f"class {i}" for i in range(10)]
            self.level = 200 if train else 100

        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (32, 32), (self.level + index, index, index)), index % 10

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Few)
    train, test, card = script.read_data(script.parse(["--torchvision", "CIFAR10", str(tmp_path)]))
    assert isinstance(train, StoredImages)
    assert train.images.shape == (50, 3, 32, 32)
    assert (int(train.images[7, 0].min()), int(test.images[7, 0].max())) == (207, 107)
    assert train.labels.tolist() == [i % 10 for i in range(50)]
    assert isinstance(card, Card)
    assert card.class_names == tuple(f"class {i}" for i in range(10))
    assert card.mean == tuple(round(level / 255, 4) for level in (224.5, 24.5, 24.5))

    Few.targets = [i % 10 for i in range(50)]
    some = ["--torchvision", "CIFAR10", str(tmp_path), "--classes", "class 7", "class 2"]
    train, _, card = script.read_data(script.parse(some))
    assert card.class_names == ("class 7", "class 2")
    assert card.num_classes == 2
    assert train.labels.tolist() == [1, 0] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --train and --test, or --torchvision"),
        (["--train", "a"], "give --train and --test, or --torchvision"),
        (["--torchvision", "CIFAR1", "data"], "torchvision has no data set 'CIFAR1'"),
        (["--train", ".", "--test", ".", "--classes", "x"], "has no class 'x'"),
        (["--torchvision", "CIFAR10", "d", "--quick", "--bundle", "x"], "not for --bundle"),
        (["--torchvision", "CIFAR10", "d", "--patch-dropout", "1"], "a share from 0 to below 1"),
        (["--train", "missing", "--test", "missing"], "no such folder: missing"),
    ],
)
def test_refusals(
    script: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        script.main([*arguments, "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
