"""The library: networks in memory in, results out, and the caller's things as they were."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import dreamkit
from dreamkit.api import given_images
from dreamkit.api.given_images import as_images
from dreamkit.api.networks import View, take_in
from dreamkit.api.recognising import builder_of
from dreamkit.card import Card
from dreamkit.deploy.exporting import export_student
from dreamkit.plugin import Regularizer
from dreamkit.report.run_log import read_records

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIEW = {"size": (3, 12, 12), "mean": MEAN, "std": STD}
QUICK = {"stages": [{"steps": 2}], "batch_size": 4, "progress": False, "device": "cpu"}


class Net(nn.Module):
    """A network of the caller's own, which no registry builds."""

    def __init__(self, classes=3, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(3):  # statistics of something
            model(torch.randn(16, 3, 12, 12))
    model.train()
    model.conv1.weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def digits():
    return dreamkit.load_teacher("bundled:digits_resnet8")


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (24, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return images, torch.arange(24) % 3


def fingerprint(model):
    """Return all of a model that a caller could miss."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        sorted(vars(model)),
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert before[1:5] == after[1:5]
    assert torch.equal(before[5], after[5])


def calls(net, pixels):
    images, labels = pixels
    other = Net()
    short = {"steps": 2, "batch_size": 8}
    quiet = {"progress": False, "device": "cpu", **VIEW}
    return {
        "invert": lambda: dreamkit.invert(net, 4, **QUICK, **VIEW),
        "prune": lambda: dreamkit.prune(
            net, pixels, channels=0.8, limits={"chunk": 1}, recovery=short, batch_size=8, **quiet
        ),
        "distill": lambda: dreamkit.distill(net, other, pixels, **short, **quiet),
        "recover": lambda: dreamkit.recover(net, pixels, sparsity=0.5, **short, **quiet),
        "extend": lambda: dreamkit.extend(
            net, (images, labels % 2), replay=pixels, images_per_class=4, steps=2, **quiet
        ),
        "judge": lambda: dreamkit.judge(net, pixels, {"other": other}, splits=2, **quiet),
        "quantize": lambda: dreamkit.quantize(
            net, pixels, latency_batches=[], max_disagreement=1, **quiet
        ),
    }


VERBS = ["invert", "prune", "distill", "recover", "extend", "judge", "quantize"]


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_caller_has_stays_as_it_was(net, pixels, verb):
    call = calls(net, pixels)[verb]
    before = fingerprint(net)
    made = call()
    assert_same(before, fingerprint(net))
    assert made.metrics
    assert made.seconds > 0
    assert torch.__version__.startswith(made.versions["torch"])
    assert repr(made).startswith(type(made).__name__)
    assert "<" in made._repr_html_()
    recipe = yaml.safe_load(made.to_recipe())
    assert recipe["teacher"]["source"] == "checkpoint", "a network in memory is to be filled in"
    assert recipe["application"]["name"]


@pytest.mark.parametrize("verb", VERBS)
def test_the_recipe_of_a_call_is_valid_and_says_what_to_fill_in(
    net, pixels, verb, invoke, tmp_path
):
    file = tmp_path / "made.yaml"
    file.write_text(calls(net, pixels)[verb]().to_recipe())
    said = invoke("validate", file)
    assert said.code == 0, said.err
    assert "no such file" in said.err, "the builder is the caller's"


def test_a_recipe_dreams_what_the_call_was_given(digits):
    dreams = dreamkit.invert(digits, 8, **QUICK)
    small = dreamkit.prune(
        digits,
        dreams,
        channels=0.9,
        limits={"chunk": 4},
        recovery={"steps": 1, "batch_size": 8},
        batch_size=8,
        evaluation=(dreams.images, dreams.labels),
        progress=False,
        device="cpu",
    )
    recipe = yaml.safe_load(small.to_recipe())
    assert recipe["synthesis"] == {**dreams.settings["synthesis"], "images": 8}
    assert recipe["evaluation"] == {"source": "folder", "path": "path/to/evaluation"}


def test_dreams_that_are_made_first_take_the_keywords_of_invert(digits):
    made = dreamkit.recover(
        digits,
        sparsity=0.5,
        synthesis={"images": 4, "batch_size": 4, "steps": 2, "preset": "paper"},
        progress=False,
        device="cpu",
        training={"steps": 1, "batch_size": 4},
    )
    assert [stage["steps"] for stage in made.settings["synthesis"]["stages"]] == [2]
    assert made.settings["synthesis"]["parameterisation"] == {"name": "pixels"}, "the paper's"


def test_several_synthesizers_dream_in_turn(digits):
    generator = {
        **{"method": "dafl", "images": 4, "batch_size": 4, "steps": 1, "width": 4},
        "regularizers": {"one_hot": 1},
    }
    made = dreamkit.recover(
        digits,
        sparsity=0.5,
        synthesis=[{"images": 4, "batch_size": 4, "steps": 2, "share": 3}, generator],
        progress=False,
        device="cpu",
        training={"steps": 1, "batch_size": 4},
    )
    assert made.metrics["synthesis.images"] == 8
    whole = made.settings["synthesis"]
    assert (whole["name"], whole["shares"], whole["images"]) == ("mixed", [3.0, 1.0], None)
    assert [entry["name"] for entry in whole["of"]] == ["deepinversion", "dafl"]
    assert yaml.safe_load(made.to_recipe())["synthesis"] == whole
    generator["name"] = generator.pop("method")
    dreams = dreamkit.invert(
        digits, 8, method="mixed", of=[generator, generator], progress=False, device="cpu"
    )
    assert len(dreams.images) == 8


def test_what_is_wrong_with_one_of_several_is_placed(digits):
    def refusal(synthesis):
        with pytest.raises(dreamkit.DreamkitError) as caught:
            dreamkit.recover(digits, sparsity=0.5, synthesis=synthesis, progress=False)
        return str(caught.value)

    few = {"images": 4}
    assert refusal([few, 3]).startswith("synthesis: should be options of invert by name")
    assert refusal([]) == "synthesis.of: give at least one synthesizer"
    assert refusal([few, {**few, "share": 0}]).startswith("synthesis.shares[1]: should be greater")
    assert refusal([few, {"stepz": 3}]).startswith("synthesis.of[1].stepz: unknown option")


# --- dreams -----------------------------------------------------------------------------------


def test_the_recipe_and_the_call_make_the_same_dreams(digits, invoke, recipe_file, tmp_path):
    options = {
        "images": 8,
        "batch_size": 4,
        "stages": [{"steps": 3}],
        "lr": 0.1,
        "regularizers": [{"name": "bn_feature", "weight": 0.3}],
    }
    recipe = {
        "name": "same",
        "seed": 5,
        "device": "cpu",
        "teacher": {"source": "bundled", "model": "digits_resnet8"},
        "synthesis": {"name": "deepinversion", **options},
        "application": {"name": "synthesize"},
    }
    assert invoke("run", recipe_file(recipe), "--out", tmp_path / "run").code == 0
    called = dreamkit.invert(digits, seed=5, device="cpu", progress=False, **options)
    run = dreamkit.load_dreams(tmp_path / "run")
    assert torch.equal(called.images, run.images)
    assert torch.equal(called.labels, run.labels)
    assert run.card == digits.card
    shared = {"synthesis.images", "synthesis.teacher_accuracy", "synthesis.statistics_distance"}
    for name in shared:
        assert called.metrics[name] == run.metrics[name]


def test_dreams_are_saved_and_read_again(digits, tmp_path):
    dreams = dreamkit.invert(digits, 6, **QUICK)
    assert len(dreams) == 6
    assert dreams.images.dtype == torch.uint8
    assert dreams.images.shape == (6, 1, 8, 8)
    assert len(dreams.labels.unique()) == 6, "no class comes twice before all have come"
    layers = digits.model.named_modules()
    assert {*dreams.quality.by_layer} == {n for n, m in layers if isinstance(m, nn.BatchNorm2d)}
    assert dreams.quality.statistics_distance == pytest.approx(
        sum(dreams.quality.by_layer.values()) / len(dreams.quality.by_layer)
    )
    folder = dreams.save(tmp_path / "dreams")
    again = dreamkit.load_dreams(folder)
    assert torch.equal(again.images, dreams.images)
    assert again.card == dreams.card
    with pytest.raises(dreamkit.DreamkitError, match="is not empty"):
        dreams.save(folder)
    dreams[:2].save(folder, overwrite=True)
    assert len(dreamkit.load_dreams(folder)) == 2
    with pytest.raises(dreamkit.DreamkitError, match="holds no dreams"):
        dreamkit.load_dreams(tmp_path / "nothing")


def test_dreams_of_another_network_are_refused_unless_they_are_meant(digits, tmp_path):
    dreams = dreamkit.invert(digits, 6, **QUICK)
    other = copy.deepcopy(digits.model)
    with torch.no_grad():
        other.get_parameter("conv1.weight").mul_(1.01)
    sees = {"size": digits.card.input_size, "mean": digits.card.mean, "std": digits.card.std}
    short = {"sparsity": 0.5, "steps": 2, "batch_size": 4, "progress": False, "device": "cpu"}
    with pytest.raises(dreamkit.DreamkitError, match="images: the dreams are of another network"):
        dreamkit.recover(other, dreams[:4], **short, **sees)
    dreamkit.recover(other, dreams, allow_foreign=True, **short, **sees)
    saved = dreamkit.load_dreams(dreams.save(tmp_path / "dreams"))
    dreamkit.recover(digits, saved, **short)


def test_dreams_in_other_shapes(digits, tmp_path):
    dreams = dreamkit.invert(digits, 6, **QUICK)
    assert isinstance(dreams.show(), Figure)
    assert torch.equal(digits.card.to_stored(dreams.normalised()), dreams.images)
    image, label = dreams.dataset()[2]
    assert image.shape == (1, 8, 8)
    assert int(label) == dreams.labels[2]
    assert torch.equal(dreams[2:4].images, dreams.images[2:4])
    files = sorted(dreams.to_folder(tmp_path / "png").rglob("*.png"))
    assert [int(file.parent.name[0]) for file in files] == sorted(dreams.labels.tolist())
    with pytest.raises(TypeError, match="take a slice"):
        dreams[0]


def test_an_interrupted_call_keeps_what_is_finished_and_goes_on(digits, tmp_path, monkeypatch):
    from dreamkit.report.run_log import MemoryLog

    options = {**QUICK, "images": 12, "out": tmp_path / "kept"}
    whole = dreamkit.invert(digits, **{**options, "out": None})
    asked = []

    def check(self, together=False):
        asked.append(0)
        if len(asked) == 4:  # in the second batch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryLog, "check", check)
        part = dreamkit.invert(digits, **options)
    assert part.interrupted
    assert len(part) == 4
    assert any("interrupted: 4 of 12" in note for note in part.notes)
    rest = dreamkit.invert(digits, **options)
    assert not rest.interrupted
    assert any("1 of 3 batches kept" in note for note in rest.notes)
    assert torch.equal(rest.images, whole.images)


def test_one_regularizer_of_the_callers_own(digits):
    seen = []

    class Brightness(Regularizer):
        def __call__(self, step):
            seen.append(step.images.shape)
            return step.images.mean()

    dreams = dreamkit.invert(
        digits, 4, regularizers={"bn_feature": 0.1, "bright": (0.5, Brightness())}, **QUICK
    )
    assert len(dreams) == 4
    assert seen[0] == (4, 1, 8, 8)


# --- students ---------------------------------------------------------------------------------


def test_a_network_of_the_callers_own_is_pruned_saved_and_loaded(net, pixels, tmp_path):
    small = dreamkit.prune(
        net,
        pixels,
        flops=0.6,
        evaluation=pixels,
        limits={"chunk": 1},
        recovery={"steps": 2, "batch_size": 8},
        batch_size=8,
        progress=False,
        device="cpu",
        **VIEW,
    )
    assert small.metrics["student.flops"] <= 0.6 * small.metrics["teacher.flops"]
    assert small.metrics["student.params"] == sum(p.numel() for p in small.model.parameters())
    assert {"student.accuracy", "student.agreement"} <= small.metrics.keys()
    assert "student.latency_ms" not in small.metrics, "nobody asked"
    assert [row for row in small.history if row["stage"] == "pruning"]
    folder = small.save(tmp_path / "student")
    with pytest.raises(dreamkit.DreamkitError, match="builder="):
        dreamkit.load_student(folder)
    again = dreamkit.load_student(folder, builder=Net)
    images = again.card.normalise(pixels[0])
    torch.testing.assert_close(again(images), small.model(images), rtol=0, atol=0)
    small.model.load_state_dict(load_file(folder / "model.safetensors"))


def test_latency_is_reported_where_it_is_asked_for(net, pixels):
    small = dreamkit.prune(
        net,
        pixels,
        channels=0.8,
        latency_backend={"name": "torch-cpu", "threads": 1, "repeats": 3},
        limits={"chunk": 1},
        recovery={"steps": 1, "batch_size": 8},
        batch_size=8,
        progress=False,
        device="cpu",
        **VIEW,
    )
    assert small.metrics["student.latency_ms"] > 0
    assert small.metrics["pruned.latency_ms"] == small.metrics["student.latency_ms"]


def test_a_student_that_was_made_is_pruned_again_and_saved(digits, tmp_path):
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    options = {
        "limits": {"chunk": 2},
        "recovery": {"steps": 1, "batch_size": 8},
        "batch_size": 8,
        "progress": False,
        "device": "cpu",
    }
    once = dreamkit.prune(digits, images, channels=0.8, **options)
    twice = dreamkit.prune(once.model, images, channels=0.8, **options)
    assert twice.metrics["student.params"] < once.metrics["student.params"]
    loaded = dreamkit.load_student(twice.save(tmp_path / "twice"))
    x = digits.card.normalise(images)
    torch.testing.assert_close(loaded(x), twice.model(x), rtol=0, atol=0)


def test_an_extended_network_knows_more_classes(net, pixels):
    images, labels = pixels
    more = dreamkit.extend(
        net,
        (images, labels % 2),
        test=(images, labels % 2),
        class_names=("a", "b", "c"),
        new_names=("d", "e"),
        replay=pixels,
        evaluation=pixels,
        images_per_class=4,
        steps=2,
        progress=False,
        device="cpu",
        **VIEW,
    )
    assert more.card.class_names == ("a", "b", "c", "d", "e")
    assert more.model(torch.zeros(1, 3, 12, 12)).shape == (1, 5)
    assert {"step1.new.accuracy", "step1.base.accuracy"} <= more.metrics.keys()


def test_classes_are_added_without_images_of_old_ones(net, pixels):
    images, labels = pixels
    more = dreamkit.extend(
        net,
        (images, labels % 2),
        replay=False,
        losses={"cross_entropy": 1},
        steps=1,
        progress=False,
        **VIEW,
    )
    assert more.card.num_classes == 5
    assert "synthesis.images" not in more.metrics
    assert yaml.safe_load(more.to_recipe())["application"]["replay"] is None


def test_classes_that_are_not_named_go_on_from_the_old_ones(net, pixels):
    images, labels = pixels
    more = dreamkit.extend(
        net,
        (images, labels % 2),
        replay=pixels,
        images_per_class=4,
        steps=1,
        progress=False,
        **VIEW,
    )
    assert more.card.num_classes == 5
    with pytest.raises(dreamkit.DreamkitError, match="no image has the label 1"):
        dreamkit.extend(net, (images, 2 * (labels % 2)), progress=False, **VIEW)


def test_others_say_what_they_see(net, pixels):
    said = dreamkit.judge(
        net, pixels, {"other": Net()}, splits=2, reference=pixels, progress=False, **VIEW
    )
    assert said.verifiers[0]["name"] == "other"
    assert 0 <= said.metrics["judge.other.accuracy"] <= 1
    with pytest.raises(dreamkit.DreamkitError, match="the inverted teacher itself"):
        dreamkit.judge(net, pixels, {"same": net}, splits=2, progress=False, **VIEW)


# --- images as people hold them ---------------------------------------------------------------


class Pictures(Dataset):
    """Pictures with labels, larger than the network takes them."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return Image.new("RGB", (20, 16), (50 * index, 0, 0)), index % 3


@pytest.mark.parametrize(
    "kind", ["uint8", "floats", "pair", "dataset", "loader", "pictures", "arrays"]
)
def test_images_in_any_shape(net, pixels, kind):
    card = dreamkit.invert(net, 2, **QUICK, **VIEW).card
    images, labels = pixels
    floats = card.normalise(images)
    given = {
        "uint8": images,
        "floats": floats,
        "pair": (floats, labels),
        "dataset": TensorDataset(floats, labels),
        "loader": DataLoader(TensorDataset(floats, labels), batch_size=5),
        "pictures": Pictures(),
        "arrays": (images.numpy(), labels.numpy()),
    }[kind]
    taken = as_images(given, card, "images")
    found, classes = taken.batch([0, 1, 4])
    assert found.shape == (3, 3, 12, 12)
    assert found.dtype == torch.uint8
    if kind == "pictures":
        assert found[2, 0, 6, 6] == 200
    else:
        assert torch.equal(found, images[[0, 1, 4]])
    assert classes.tolist() == ([-1, -1, -1] if kind in {"uint8", "floats"} else [0, 1, 1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(4, 3, 12, 12), r"lie in \[0, 1\]: normalise them"),
        (torch.rand(4, 3, 12, 12) * 255, "which no pixel gives"),
        (torch.full((4, 3, 12, 12), float("nan")), "not finite"),
        (torch.zeros(4, 1, 12, 12, dtype=torch.uint8), "have 1 channels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"the images are \(3, 8, 8\)"),
        (torch.zeros(0, 3, 12, 12, dtype=torch.uint8), "no images"),
        (torch.zeros(3, 12, 12, dtype=torch.uint8), r"tensor \(N, C, H, W\)"),
        ((torch.zeros(4, 3, 12, 12, dtype=torch.uint8), [0, 1, 2, 9]), "label 9 is none"),
        ((torch.zeros(4, 3, 12, 12, dtype=torch.uint8), [0, 1]), r"shape \(4,\)"),
        (DataLoader(TensorDataset(torch.zeros(0, 3, 12, 12))), "yields no batch"),
        (3, "should be dreams, a tensor"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_images_that_do_not_fit_are_refused(net, given, message):
    with pytest.raises(dreamkit.DreamkitError, match=message) as refused:
        dreamkit.prune(net, given, flops=0.5, progress=False, **VIEW)
    assert str(refused.value).startswith("images") or refused.value.path == ("images",)


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, "size is not known of Net"),
        ({"size": None, "mean": None, "std": None}, "size and mean and std are not known"),
        ({"mean": (0.5,)}, "mean and std need one value for each"),
        ({"size": (1, 12, 12), "mean": (0.5,), "std": (0.5,)}, "does not take 2 images of size"),
        ({"size": (12, 12)}, r"should be \(channels, height, width\)"),
        ({"std": (0.0, 0.1, 0.1)}, "std should be greater than 0"),
        ({"class_names": ("a", "b")}, "2 names for 3 outputs"),
        ({"seed": -1}, "seed: should be 0 or more"),
        ({"device": "cuda:99"}, "torch sees no device"),
        ({"lr": -1}, r"lr: should be greater than 0 \(got -1\)"),
        ({"steps": 0}, "steps: should be a whole number above 0"),
        ({"stepps": 3}, "stepps: unknown option"),
        ({"preset": "fats"}, "preset: should be fast or paper"),
        ({"regularizers": {"tvv": 1}}, "did you mean 'tv'"),
        ({"labels": [7]}, "label 7 is none"),
    ],
)
def test_what_cannot_be_inverted_is_refused(net, change, message):
    with pytest.raises(dreamkit.DreamkitError, match=message):
        dreamkit.invert(net, 2, **{"progress": False, **VIEW, **change})


def test_networks_that_cannot_be_inverted(net):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 3))
    with pytest.raises(dreamkit.DreamkitError, match="BatchNorm"):
        dreamkit.invert(plain, 2, progress=False, **VIEW)
    with torch.no_grad():
        net.fc.bias[0] = float("nan")
    with pytest.raises(dreamkit.DreamkitError, match=r"'fc\.bias' holds values"):
        dreamkit.invert(net, 2, progress=False, **VIEW)
    with pytest.raises(dreamkit.DreamkitError, match=r"should be a torch\.nn\.Module, not str"):
        dreamkit.invert("resnet18", 2)


def test_of_a_stream_without_end_a_part_is_read_and_that_is_said(monkeypatch):
    monkeypatch.setattr(given_images, "STREAM_IMAGES", 20)

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(3, 12, 12, dtype=torch.uint8), 1

    card = Card("net", (3, 12, 12), MEAN, STD, 3, "tests")
    images = as_images(DataLoader(Endless(), batch_size=8), card, "images")
    assert len(images) == 24
    assert images.notes == (
        "images: the DataLoader does not tell its length: its first 24 images are taken, and no "
        "more is read",
    )
    finite = DataLoader(TensorDataset(torch.zeros(30, 3, 12, 12).byte(), torch.ones(30)), 8)
    assert len(as_images(finite, card, "images")) == 30
    assert as_images(finite, card, "images").notes == ()


def test_a_student_of_other_classes_is_refused(net, pixels):
    with pytest.raises(dreamkit.DreamkitError, match="4 outputs"):
        dreamkit.distill(net, Net(4), pixels, steps=1, progress=False, **VIEW)


class Wrapping(Net):
    """Returns its logits in a mapping, as Hugging Face's do."""

    def forward(self, x):
        return {"logits": super().forward(x)}


def test_a_network_that_wraps_its_logits_learns_classes_and_is_exported(pixels, tmp_path):
    new = (pixels[0], pixels[1] % 2)
    more = dreamkit.extend(
        Wrapping(), new, replay=pixels, steps=1, batch_size=4, progress=False, **VIEW
    )
    assert more.model(torch.zeros(1, 3, 12, 12)).shape == (1, 5)
    more.save(tmp_path / "student")
    code = "import test_api\n\n\ndef make():\n    return test_api.Wrapping()\n"
    (tmp_path / "make.py").write_text(code.replace("test_api", __name__))
    found = export_student(tmp_path, "torchscript", builder=f"{tmp_path / 'make.py'}:make")
    assert found.max_error < 1e-4
    assert {"student", "unpruned"} == set(found.latency)


def test_a_quantised_network_judges(net, pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a future without quantisation
        judge = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)
        found = dreamkit.judge(net, pixels, {"small": judge}, splits=2, progress=False, **VIEW)
    assert "judge.small.accuracy" in found.metrics


def test_options_of_students_are_checked_by_name(net, pixels):
    with pytest.raises(dreamkit.DreamkitError, match="flops: should be less than 1"):
        dreamkit.prune(net, pixels, flops=63, progress=False, **VIEW)
    with pytest.raises(dreamkit.DreamkitError, match="give at least one of flops"):
        dreamkit.prune(net, pixels, progress=False, **VIEW)
    with pytest.raises(dreamkit.DreamkitError, match=r"^lrr: unknown option; did you mean 'lr'"):
        dreamkit.distill(net, Net(), pixels, lrr=3, progress=False, **VIEW)
    with pytest.raises(dreamkit.DreamkitError, match="evaluation needs images with labels"):
        dreamkit.recover(net, pixels, sparsity=0.5, evaluation=pixels[0], progress=False, **VIEW)


def test_messages_have_the_functions_own_keywords_and_pythons_words(net, pixels):
    def refusal(function, *given, **options):
        with pytest.raises(dreamkit.DreamkitError) as caught:
            function(*given, progress=False, **VIEW, **options)
        return str(caught.value)

    assert "did you mean 'preset'?" in refusal(dreamkit.invert, net, 2, presett="fast")
    assert "did you mean 'flops'?" in refusal(dreamkit.prune, net, pixels, flop=0.5)
    assert "did you mean 'seed'?" in refusal(dreamkit.distill, net, Net(), pixels, seeds=1)
    listed = refusal(dreamkit.invert, net, 2, qqq=1)
    assert "method" in listed
    assert "name" not in listed.replace("class_names", "")
    assert refusal(dreamkit.invert, net, 2, method="dreams").startswith("method: no name 'dreams'")
    nested = refusal(dreamkit.prune, net, flops=0.5, synthesis={"stepz": 3})
    assert nested.startswith("synthesis.stepz: unknown option; did you mean 'steps'?")
    assert "not a dict" in refusal(dreamkit.invert, net, 2, stages={"steps": 3})


def test_timm_and_torchvision_tell_how_they_see_images():
    import timm
    import torchvision

    network = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    taken = take_in(network, View(), [].append)
    assert taken.card.input_size == (3, 176, 176)
    assert taken.card.num_classes == 7
    assert taken.builder == {
        "source": "timm",
        "model": "resnet10t",
        "weights": None,
        "num_classes": 7,
    }
    network = torchvision.models.resnet18(weights=None)
    taken = take_in(network, View(), [].append)
    assert taken.card.input_size == (3, 224, 224)
    assert taken.card.mean == (0.485, 0.456, 0.406)
    assert taken.builder == {"source": "torchvision", "model": "resnet18", "weights": None}
    changed = torchvision.models.resnet18(weights=None)
    changed.layer4 = nn.Identity()
    changed.fc = nn.Linear(256, 10)
    card = Card("it", (3, 64, 64), (0.5,) * 3, (0.5,) * 3, 10, "here")
    assert builder_of(changed, card)["source"] == "memory"
    changed.fc = nn.BatchNorm1d(256)
    card = dataclasses.replace(card, num_classes=256)
    assert builder_of(changed, card)["source"] == "memory", "its last tensor has no side"


def test_a_builder_that_makes_the_same_shapes_has_to_do_the_same():
    import timm
    import torchvision

    size, state = {**VIEW, "size": (3, 32, 32)}, torch.get_rng_state()
    changed = timm.create_model("resnet10t", num_classes=7, act_layer=nn.SiLU).eval()
    assert take_in(changed, View(**size), [].append).builder["source"] == "memory"
    changed = torchvision.models.resnet18(num_classes=7).eval()
    changed.relu = nn.SiLU()
    torch.set_rng_state(state)
    assert take_in(changed, View(**size), [].append).builder["source"] == "memory"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(3, -1, 12), (3, 0, 12), (3, 12.5, 12), (3, 12), 12])
def test_sizes_that_are_none_are_refused(net, size):
    with pytest.raises(dreamkit.DreamkitError, match=r"^size: should be"):
        dreamkit.invert(net, 4, progress=False, **{**VIEW, "size": size})


def test_means_that_are_no_numbers_are_refused(net):
    with pytest.raises(dreamkit.DreamkitError, match="mean and std should be finite"):
        dreamkit.invert(net, 4, progress=False, **{**VIEW, "mean": (float("nan"),) * 3})


def test_of_several_outputs_the_number_of_names_tells_the_logits(net):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 5), self.net(x)

    with pytest.raises(dreamkit.DreamkitError, match="more than one may be its logits"):
        take_in(Both(), View(**VIEW), [].append)
    names = ("a", "b", "c")
    assert take_in(Both(), View(**VIEW, class_names=names), [].append).card.num_classes == 3


# --- the package ------------------------------------------------------------------------------


def test_importing_the_package_takes_no_torch():
    code = "import sys, dreamkit; assert 'torch' not in sys.modules; print(dir(dreamkit))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in dreamkit.__all__:
        assert name in done.stdout
        assert getattr(dreamkit, name) is not None


def test_nothing_is_left_behind(net, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    dreamkit.invert(net, 2, **QUICK, **VIEW)
    assert list(tmp_path.iterdir()) == []


def test_out_is_a_folder_like_a_runs(net, pixels, tmp_path):
    short = {"steps": 1, "batch_size": 8}
    dreamkit.distill(
        net, Net(), synthesis={"images": 4, "batch_size": 4, "stages": [{"steps": 1}]},
        out=tmp_path, progress=False, device="cpu", **short, **VIEW,
    )  # fmt: skip
    assert len(dreamkit.load_student(tmp_path / "student", builder=Net).state_dict()) > 0
    assert len(list((tmp_path / "dreams").glob("shard-*"))) == 1
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path)


CONSUMER = """
import torch
from torch import nn
import dreamkit

def use(model: nn.Module, student: nn.Module) -> nn.Module:
    dreams: dreamkit.Dreams = dreamkit.invert(
        model, size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), images=64
    )
    pixels: torch.Tensor = dreams.images
    good: float = dreams.quality.teacher_accuracy
    small = dreamkit.prune(model, dreams, flops=0.63, criteria={"taylor": 1, "latency_lut": 0.1})
    share: float = small.metrics["pruned.flops_ratio"]
    small.save("student/")
    small.export("m.onnx")
    tiny = dreamkit.distill(model, student, dreams, steps=2000)
    print(pixels.shape, good, share, dreamkit.load_dreams("dreams/").card.input_size)
    loaded = dreamkit.load_student("student/")
    print(loaded(loaded.card.normalise(pixels)))
    reveal_type(tiny.model)
    return tiny.model
"""


@pytest.mark.slow
def test_a_consumers_script_has_types(tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "consumer.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(dreamkit.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Revealed type is "torch.nn.modules.module.Module"' in done.stdout, done.stdout
    assert "Success" in done.stdout, done.stdout


def test_large_inputs_are_dreamed_at_half_their_size_first(digits):
    import dataclasses

    from dreamkit.api.invert import synthesizer_options
    from dreamkit.synthesizers.stage import Stage, default_stages

    large = dataclasses.replace(
        digits, card=dataclasses.replace(digits.card, input_size=(1, 224, 192))
    )
    made = synthesizer_options({}, large, steps=12)
    assert made["stages"] == [
        {"steps": 10, "size": (112, 96)},
        {"steps": 2, "size": None},
    ]
    assert default_stages(digits) == (Stage(240),)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(224 * 192, 10))
    stages = default_stages(dataclasses.replace(large, model=fixed))
    assert stages == (Stage(240),)  # half of its size would not go through


def test_steps_of_another_method_are_its_own_option(digits):
    generated = {"regularizers": {"one_hot": 1}, "width": 8, "batch_size": 4, "progress": False}
    dreams = dreamkit.invert(digits, 4, method="dafl", steps=3, **generated)
    assert dreams.settings["synthesis"]["steps"] == 3
    with pytest.raises(dreamkit.DreamkitError, match="did you mean 'deepinversion'"):
        dreamkit.invert(digits, 4, method="deepinvert", steps=3, progress=False)


def test_networks_by_name():
    network = dreamkit.load_teacher("torchvision:resnet18", weights=None)
    assert not network.card.trained
    assert dreamkit.invert(network.model, 1, steps=2, progress=False).card == network.card
    for wrong in ("IMAGENET1K_V2", False):
        with pytest.raises(dreamkit.DreamkitError, match="should be 'default', or None"):
            dreamkit.load_teacher("torchvision:resnet18", weights=wrong)
    with pytest.raises(dreamkit.DreamkitError, match="has none but its own"):
        dreamkit.load_teacher("bundled:digits_resnet8", weights=None)
    with pytest.raises(dreamkit.DreamkitError, match="did you mean 'digits_resnet8'"):
        dreamkit.load_teacher("bundled:digits_resnet9")
    with pytest.raises(dreamkit.DreamkitError, match="write SOURCE:MODEL"):
        dreamkit.load_teacher("resnet18")


# --- a folder of one's own --------------------------------------------------------------------


def test_a_folder_is_one_calls(net, pixels, tmp_path):
    short = {"steps": 2, "batch_size": 8, "progress": False, "device": "cpu", **VIEW}
    torch.manual_seed(1)
    student = Net()
    once = dreamkit.distill(net, student, pixels, out=tmp_path / "o", **short)
    again = dreamkit.distill(net, student, pixels, out=tmp_path / "o", **short)
    for name, tensor in once.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert not (tmp_path / "o" / "checkpoints").exists()
    others = [
        {"lr": 1e-3},
        {"seed": 3},
        {"mean": (0.1, 0.1, 0.1)},
    ]
    for change in others:
        with pytest.raises(dreamkit.DreamkitError, match="holds the work of another call"):
            dreamkit.distill(net, student, pixels, out=tmp_path / "o", **{**short, **change})
    images, labels = pixels
    with pytest.raises(dreamkit.DreamkitError, match="images or networks differ"):
        dreamkit.distill(net, student, (images.flip(0), labels), out=tmp_path / "o", **short)
    with pytest.raises(dreamkit.DreamkitError, match="images or networks differ"):
        dreamkit.distill(net, Net(), pixels, out=tmp_path / "o", **short)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(dreamkit.DreamkitError, match="is not empty"):
        dreamkit.distill(net, student, pixels, out=tmp_path / "mine", **short)


def test_dreams_in_a_folder_of_a_call_are_loaded(digits, tmp_path):
    dreams = dreamkit.invert(digits, 4, out=tmp_path / "o", **QUICK)
    again = dreamkit.load_dreams(tmp_path / "o")
    assert torch.equal(again.images, dreams.images)
    assert again.card == digits.card
    assert yaml.safe_load(again.to_recipe())["application"] == {"name": "synthesize"}


def test_a_student_is_not_overwritten_unasked(net, pixels, tmp_path):
    options = {"sparsity": 0.5, "steps": 1, "batch_size": 8, "progress": False, **VIEW}
    made = dreamkit.recover(net, pixels, **options)
    made.save(tmp_path / "s")
    with pytest.raises(dreamkit.DreamkitError, match="holds a student already"):
        made.save(tmp_path / "s")
    made.save(tmp_path / "s", overwrite=True)
    with pytest.raises(dreamkit.DreamkitError, match="should be a function or class"):
        dreamkit.load_student(tmp_path / "s", builder="mynet:Net")
    with pytest.raises(dreamkit.DreamkitError, match="holds no student"):
        made.save(tmp_path, overwrite=True)


# --- what notebooks throw at it ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": 0.5}, r"mean: should be several numbers"),
        ({"size": 32}, r"size: should be several numbers, such as \(3, 224, 224\)"),
        ({"class_names": "abc"}, "class_names: should be several names"),
        ({"synthesis": {"images": -5}}, "synthesis: leave it out: nothing is dreamed here"),
        ({"target": {"flops": 0.5}, "flops": 0.5}, "target: leave it out"),
        ({"steps": 5}, r"steps: give it as recovery=\{'steps': ...\}"),
        ({"criteria": {}}, "criteria: give at least one criterion"),
        ({"adaptive": {"every": 5}}, "adaptive: it dreams, so leave 'images' out"),
        ({"channels": 0.01, "limits": {"chunk": 8}}, r"(limits|target): "),
    ],
)
def test_mistakes_name_the_option(net, pixels, change, message):
    options = {"channels": 0.8, "progress": False, "device": "cpu", **VIEW, **change}
    with pytest.raises(dreamkit.DreamkitError, match=message):
        dreamkit.prune(net, pixels, **options)


def test_other_kinds_of_sequences_are_taken(net):
    import numpy as np

    dreams = dreamkit.invert(
        net,
        2,
        size=np.array([3, 12, 12]),
        mean=torch.tensor(MEAN, dtype=torch.float64),
        std=np.array(STD),
        **QUICK,
    )
    assert dreams.card.mean == MEAN
    assert dreams.card.input_size == (3, 12, 12)


def test_labels_of_other_classes_are_refused(net, digits, pixels):
    images, _ = pixels
    items = [(image, "cat") for image in images[:4]]
    with pytest.raises(dreamkit.DreamkitError, match=r"a label should be a whole number"):
        dreamkit.recover(net, items, sparsity=0.5, progress=False, **VIEW)
    wide = Net(classes=5)
    dreams = dreamkit.invert(wide, 5, **QUICK, **VIEW)
    with pytest.raises(dreamkit.DreamkitError, match="label 3 is none of the 3 classes"):
        dreamkit.recover(net, dreams, sparsity=0.5, allow_foreign=True, progress=False, **VIEW)
    mixed = [images[0], images[1][:, :8]]
    with pytest.raises(dreamkit.DreamkitError, match="an image is"):
        dreamkit.recover(net, mixed, sparsity=0.5, progress=False, **VIEW)


def test_data_sets_of_mappings_are_taken(net, pixels):
    class Named(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": Image.new("RGB", (12, 12), (index, 0, 0)), "label": index % 3}

    card = dreamkit.invert(net, 2, **QUICK, **VIEW).card
    images, labels = as_images(Named(), card, "images").batch([1, 2])
    assert images[:, 0, 0, 0].tolist() == [1, 2]
    assert labels.tolist() == [1, 2]


def test_verifiers_are_believed_about_themselves(net, pixels):
    import torchvision

    other = torchvision.models.resnet18(weights=None, num_classes=3)
    with pytest.raises(dreamkit.DreamkitError, match="verifiers: should be networks by name"):
        dreamkit.judge(net, pixels, [other], splits=1, progress=False, **VIEW)
    card = dreamkit.invert(net, 2, **QUICK, **VIEW).card
    taken = take_in(other, View(), [].append, otherwise=card)
    assert taken.card.input_size == (3, 224, 224)
    assert taken.card.mean == (0.485, 0.456, 0.406)
    plain = take_in(Net(), View(), [].append, otherwise=card)
    assert plain.card.mean == MEAN


@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_a_generator_of_new_images_is_read_once(net, pixels, monkeypatch, names):
    monkeypatch.setattr(given_images, "STREAM_IMAGES", 16)
    images, labels = pixels
    batches = ((images[i : i + 8], labels[i : i + 8] % 2) for i in range(0, 24, 8))
    options = {"replay": pixels, "images_per_class": 4, "steps": 1, "progress": False, **VIEW}
    more = dreamkit.extend(net, batches, new_names=names, **options)
    assert more.card.num_classes == 5
    assert any("its first 16 images are taken" in note for note in more.notes)


def test_names_of_new_classes_are_several(net, pixels):
    images, labels = pixels
    options = {"replay": pixels, "steps": 1, "progress": False, **VIEW}
    with pytest.raises(dreamkit.DreamkitError, match="new_names: should be several names"):
        dreamkit.extend(net, (images, labels % 2), new_names="ab", **options)


def test_listeners_hear_of_a_call(net, monkeypatch):
    from dreamkit.api import session
    from dreamkit.types import BatchDreamed, Noted, RunFailed, RunFinished, RunStarted

    heard, registries = [], session.build_registries()
    registries.listeners.append(("mine", heard.append))
    monkeypatch.setattr(session, "build_registries", lambda: registries)
    dreamkit.invert(net, 2, **QUICK, **VIEW)
    kinds = [type(event) for event in heard if type(event) is not Noted]  # of the intake
    assert kinds[0] is RunStarted
    assert BatchDreamed in kinds
    assert kinds[-1] is RunFinished
    heard.clear()
    with pytest.raises(dreamkit.DreamkitError):
        dreamkit.invert(net, 2, lr=-1, **QUICK, **VIEW)
    assert type(heard[-1]) is RunFailed
    assert BatchDreamed not in map(type, heard)


def test_a_network_that_was_changed_does_not_tell_what_it_was(digits):
    network = copy.deepcopy(digits.model)
    assert take_in(network, View(), [].append).builder == digits.builder
    network.fc = nn.Linear(network.fc.in_features, 4)
    changed = take_in(network, View(class_names=["a", "b", "c", "d"]), [].append)
    assert changed.builder["source"] == "memory"
    assert changed.card.num_classes == 4


class Odd(Net):
    """Returns a mapping, and writes on its input."""

    def forward(self, x):
        logits = super().forward(x.mul_(2))
        found = {"features": logits * 3, "logits": logits}
        return (logits, logits[:, :1]) if self.training else found


class Clean(Net):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize("function", ["prune", "recover"])
def test_a_student_of_an_odd_network_is_that_of_the_same_one_written_cleanly(
    tmp_path, pixels, function
):
    ends = []
    for kind in (Odd, Clean):
        torch.manual_seed(0)
        own = {"flops": 0.8, "recovery": {"steps": 2}} if function == "prune" else {"sparsity": 0.5}
        made = getattr(dreamkit, function)(
            kind().eval(), pixels, **own, progress=False, seed=1, **VIEW
        )
        made.save(tmp_path / kind.__name__)
        loaded = dreamkit.load_student(tmp_path / kind.__name__, builder=kind)
        images = torch.randn(4, 3, 12, 12)
        assert torch.equal(loaded(images.clone()), made.model(images.clone()))
        ends.append(loaded(images * 0 + 1))
        loaded.train()
        assert loaded(images).shape == (4, 3)
    assert torch.equal(*ends)
