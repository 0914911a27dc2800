"""Teachers and their cards; no test here downloads anything."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from dreamkit.errors import DreamkitError, OptionError, WeightsMismatch
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.sources.digits import Digits
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.checkpoint import CheckpointTeacher
from dreamkit.teachers.checkpoint_file import read_checkpoint
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.teachers.timm import TimmTeacher
from dreamkit.teachers.torchvision import TorchvisionTeacher
from dreamkit.teachers.weights import find_states, hash_weights, is_weights_file, load_into

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- bundled ----------------------------------------------------------------------------------


def test_bundled_card():
    teacher = BundledTeacher("digits_resnet8").load(0)
    card = teacher.card
    assert (card.input_size, card.num_classes, card.trained) == ((1, 8, 8), 10, True)
    assert card.class_names == tuple("0123456789")
    assert card.weights_sha256 == hash_weights(teacher.model)
    assert teacher.builder == {"source": "bundled", "model": "digits_resnet8"}
    assert not teacher.model.training
    assert teacher.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("model", ["digits_resnet8", "digits_vit", "digits_convnext"])
def test_bundled_accuracy_on_digits_it_never_saw(model):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (dreamkit[demo])")
    teacher = BundledTeacher(model).load(0)
    found = accuracy(teacher.model, Digits().open(teacher.card), teacher.card, torch.device("cpu"))
    assert found >= 0.97
    assert found == pytest.approx(teacher.card.notes["test_accuracy"], abs=2 / 540)


@pytest.mark.parametrize(
    ("model", "norms"), [("cifar10_resnet20", 19), ("cifar10_convnext", 0), ("cifar10_vit", 0)]
)
def test_bundled_networks_of_photographs(model, norms):
    teacher = BundledTeacher(model).load(0)
    assert (teacher.card.input_size, teacher.card.num_classes) == ((3, 32, 32), 10)
    assert teacher.card.class_names[0] == "airplane"
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.model.modules()) == norms
    noise = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    logits = teacher.model(teacher.card.normalise(noise.byte()))
    assert logits.shape == (4, 10)
    assert float(logits.detach().std()) > 0.1, "trained"


def test_bundled_build_is_the_architecture_unweighted():
    source = BundledTeacher("digits_resnet8")
    built, loaded = source.build(), source.load(0).model
    shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes
    assert not torch.equal(built.conv1.weight, loaded.conv1.weight)


def test_unknown_bundled_model():
    with pytest.raises(OptionError, match="did you mean 'digits_resnet8'") as caught:
        BundledTeacher("digits_resnet")
    assert caught.value.option == "model"


@pytest.mark.parametrize(
    ("depth", "width", "params"),
    [
        # ResNet-20 for 3×32×32 has 0.27 M parameters without projections (He et al., table 6).
        # Here: stem 3·16·9 + 32; stage 1: 6·(16·16·9) + 6·32; stage 2: 16·32·9 + 5·(32·32·9)
        # + 6·64 + projection 16·32 + 64; stage 3: 32·64·9 + 5·(64·64·9) + 6·128 + projection
        # 32·64 + 128; fc 64·10 + 10.
        (
            20,
            16,
            (432 + 32)
            + (6 * 2304 + 192)
            + (4608 + 5 * 9216 + 384 + 512 + 64)
            + (18432 + 5 * 36864 + 768 + 2048 + 128)
            + 650,
        ),
    ],
)
def test_small_resnet_parameters_by_hand(depth, width, params):
    model = SmallResNet(depth, 10, width=width)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("depth", [2, 7, 9, 21])
def test_small_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match="6n\\+2"):
        SmallResNet(depth, 10)


# --- timm -------------------------------------------------------------------------------------


def test_timm_is_imported_when_one_is_asked_for():
    code = "import sys, dreamkit.teachers.timm; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_timm_card_is_read_off_timms_metadata():
    teacher = TimmTeacher("resnet10t", weights=None).load(0)
    card = teacher.card
    assert card.name == "timm/resnet10t"
    assert (card.input_size, card.num_classes) == ((3, 176, 176), 1000)
    assert (card.mean, card.std) == (IMAGENET["mean"], IMAGENET["std"])
    assert (card.trained, card.origin) == (False, "random weights")
    assert card.weights_sha256 == hash_weights(teacher.model)
    assert not teacher.model.training


def test_timm_other_classes_and_channels():
    source = TimmTeacher("test_resnet", weights=None, num_classes=5, input_size=(1, 32, 48))
    teacher = source.load(0)
    assert (teacher.card.input_size, teacher.card.num_classes) == ((1, 32, 48), 5)
    assert teacher.card.mean == (0.5,)  # the mean of test_resnet's (0.5, 0.5, 0.5)
    assert teacher.model(torch.zeros(2, 1, 32, 48)).shape == (2, 5)
    rebuilt = TimmTeacher(**{k: v for k, v in teacher.builder.items() if k != "source"}).build()
    rebuilt.load_state_dict(teacher.model.state_dict())
    x = torch.ones(1, 1, 32, 48)
    assert torch.equal(rebuilt.eval()(x), teacher.model(x))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_weights_from_a_file(tmp_path, suffix):
    made = TimmTeacher("test_resnet", weights=None, num_classes=4).load(1)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(made.model.state_dict(), path)
    else:
        safetensors.torch.save_file(made.model.state_dict(), path)
    teacher = TimmTeacher("test_resnet", weights=str(path), num_classes=4).load(0)
    assert_same_weights(teacher.model, made.model)
    assert teacher.card.trained
    assert teacher.card.origin == str(path)
    assert teacher.card.weights_sha256 == made.card.weights_sha256
    assert teacher.builder["weights"] is None


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"model": "resnet10"}, "model"),
        ({"model": "test_resnet", "weights": "missing.pth"}, "weights"),
        ({"model": "test_resnet", "weights": "default", "num_classes": 5}, "num_classes"),
    ],
)
def test_timm_refusals(options, option):
    with pytest.raises(OptionError) as caught:
        TimmTeacher(**options)
    assert caught.value.option == option


# --- torchvision ------------------------------------------------------------------------------


def test_torchvision_card_comes_with_the_weights_metadata():
    teacher = TorchvisionTeacher("resnet18", weights=None).load(0)
    card = teacher.card
    assert card.name == "torchvision/resnet18"
    assert (card.input_size, card.num_classes) == ((3, 224, 224), 1000)
    assert (card.mean, card.std) == (IMAGENET["mean"], IMAGENET["std"])
    assert card.class_names[0] == "tench"
    assert (card.trained, card.origin) == (False, "random weights")
    assert card.weights_sha256 == hash_weights(teacher.model)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_torchvision_weights_from_a_file(tmp_path, suffix):
    options = {"num_classes": 7, "input_size": (3, 64, 96)}
    made = TorchvisionTeacher("shufflenet_v2_x0_5", weights=None, **options).load(1)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(made.model.state_dict(), path)
    else:
        safetensors.torch.save_file(made.model.state_dict(), path)
    teacher = TorchvisionTeacher("shufflenet_v2_x0_5", weights=str(path), **options).load(0)
    assert_same_weights(teacher.model, made.model)
    assert teacher.card.input_size == (3, 64, 96)
    assert (teacher.card.num_classes, teacher.card.class_names) == (7, None)
    assert teacher.card.origin == str(path)


def test_torchvision_file_with_heads_for_training_only(tmp_path, monkeypatch):
    # The file that torchvision publishes for GoogLeNet holds aux1 and aux2, which the teacher
    # goes without; giving its path is what a failed download advises.
    published = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    path = tmp_path / "googlenet-1378be20.pth"
    path.write_text("weights")
    state = published.state_dict()  # 50 MB that need not go over the disk
    monkeypatch.setattr("dreamkit.teachers.weights.read_checkpoint", lambda path: state)
    teacher = TorchvisionTeacher("googlenet", weights=str(path)).load(0)
    assert torch.equal(teacher.model.fc.weight, published.fc.weight)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"model": "resnet19"}, "model"),
        ({"model": "resnet18", "weights": "IMAGENET1K_V9"}, "weights"),
        ({"model": "resnet18", "weights": "missing.safetensors"}, "weights"),
        ({"model": "resnet18", "input_size": (1, 32, 32)}, "input_size"),
        ({"model": "resnet18", "num_classes": 5}, "num_classes"),
    ],
)
def test_torchvision_refusals(options, option):
    with pytest.raises(OptionError) as caught:
        TorchvisionTeacher(**options)
    assert caught.value.option == option


# --- checkpoints ------------------------------------------------------------------------------


CODE = """
from torch import nn


def make(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(),
                         nn.Linear(width * 36, 3))


def number():
    return 3


def broken():
    raise KeyError("inner")
"""
CARD = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.5, 0.125),
    "num_classes": 3,
}


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(CODE)
    return str(path)


def test_checkpoint_with_key_prefix_and_builder_from_a_file(code, tmp_path):
    made = CheckpointTeacher(f"{code}:make", **CARD, arguments={"width": 5}).load(1).model
    nested = {f"module.{k}": v for k, v in made.state_dict().items()}
    path = tmp_path / "last.pth"
    torch.save({"epoch": 3, "state": {"model": nested}}, path)
    teacher = CheckpointTeacher(
        f"{code}:make",
        **CARD,
        path=str(path),
        key="state.model",
        prefix="module.",
        arguments={"width": 5},
        class_names=("a", "b", "c"),
    ).load(0)
    assert_same_weights(teacher.model, made)
    assert not teacher.model.training
    card = teacher.card
    assert (card.input_size, card.mean, card.std) == (CARD["input_size"], CARD["mean"], CARD["std"])
    assert (card.num_classes, card.class_names) == (3, ("a", "b", "c"))
    assert (card.trained, card.origin) == (True, str(path))
    assert teacher.builder["source"] == "checkpoint"
    assert teacher.builder["path"] is None


def test_checkpoint_builder_from_an_installed_module():
    source = CheckpointTeacher(
        "dreamkit.teachers.small_resnet:SmallResNet",
        **CARD,
        arguments={"depth": 8, "num_classes": 3},
    )
    teacher = source.load(0)
    assert isinstance(teacher.model, SmallResNet)
    assert (teacher.card.trained, teacher.card.origin) == (False, "random weights")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "returned int, not a module"),
        ("broken", "failed: KeyError"),
        ("absent", "no function 'absent'"),
    ],
)
def test_builders_that_do_not_build(code, function, message):
    with pytest.raises(DreamkitError, match=message):
        CheckpointTeacher(f"{code}:{function}", **CARD).build()


def test_checkpoints_that_pickle_code_are_refused(code, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"weights": Payload()}, path)
    with pytest.raises(DreamkitError, match="refused"):
        CheckpointTeacher(f"{code}:make", **CARD, path=str(path)).load(0)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DreamkitError, match=str(path)):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dict_is_explained(tmp_path):
    content = {"epoch": 3, "model": {"w": torch.ones(1)}}
    with pytest.raises(DreamkitError, match=r"x: no key 'net'.*epoch, model"):
        find_states("x", content, "net")
    assert find_states("x", content, "model") == {"model": {"w": torch.ones(1)}}
    with pytest.raises(DreamkitError, match=r"it holds: epoch; give 'key'"):
        find_states("x", {"epoch": 3})
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(DreamkitError, match=r"another protocol.*without pickle_protocol"):
        read_checkpoint(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"hello world")
    with pytest.raises(
        DreamkitError, match=r"weights: neither torch.save nor safetensors wrote it"
    ):
        read_checkpoint(tmp_path / "x.pth")
    (tmp_path / "y.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DreamkitError, match="cannot be read as weights"):
        read_checkpoint(tmp_path / "y.safetensors")


def test_weights_that_do_not_fit_are_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = dict(model.state_dict())
    state["0.weight"] = torch.ones(4, 2)
    del state["1.bias"]
    del state["1.num_batches_tracked"]  # absent from old checkpoints, and not missed
    state["2.weight"] = torch.ones(1)
    with pytest.raises(WeightsMismatch) as caught:
        load_into(model, state, "x.pth")
    assert caught.value.message == (
        "x.pth does not fit the model: 1 missing: 1.bias; 1 unexpected: 2.weight; "
        "1 of other shape: 0.weight (4, 2), model has (3, 2)"
    )


# --- random weights and their hash ------------------------------------------------------------


def sources(code):
    return [
        TimmTeacher("test_resnet", weights=None),
        TorchvisionTeacher("shufflenet_v2_x0_5", weights=None),
        CheckpointTeacher(f"{code}:make", **CARD),
    ]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["timm", "torchvision", "checkpoint"])
def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone(code, number):
    source = sources(code)[number]
    before = torch.get_rng_state()
    first = source.load(1).card.weights_sha256
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert source.load(1).card.weights_sha256 == first
    assert source.load(2).card.weights_sha256 != first


def test_hash_weights_changes_with_every_value_name_dtype_and_shape():
    def model():
        torch.manual_seed(0)  # forked below
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    with torch.random.fork_rng():
        hashes = [hash_weights(model())]
        assert hash_weights(model()) == hashes[0]
        changed = model()
        with torch.no_grad():
            changed[0].weight[0, 0] += 1e-6
        hashes.append(hash_weights(changed))
        changed = model()
        changed[1].running_mean[2] = 1
        hashes.append(hash_weights(changed))
        changed = model()
        changed[1].num_batches_tracked += 1
        hashes.append(hash_weights(changed))
        hashes.append(hash_weights(model().double()))
        hashes.append(hash_weights(nn.Sequential(*model(), nn.Identity(), nn.ReLU())))
        hashes.append(hash_weights(nn.ModuleDict({"0": model()[0], "bn": model()[1]})))
    assert hashes[5] == hashes[0], "layers without tensors do not count"
    assert len(set(hashes)) == 6


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("default", False), ("a1_in1k", False), (None, False), ("x/y.pth", True), ("y.th", True)],
)
def test_is_weights_file(weights, expected):
    assert is_weights_file(weights) is expected
