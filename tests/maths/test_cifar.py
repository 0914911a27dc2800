"""The networks for 32×32 images, their weights and their cards."""

from __future__ import annotations

import itertools
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import dreamkit
from dreamkit.card import Card
from dreamkit.errors import OptionError, WeightsMismatch
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.store.artifact import write_artifact
from dreamkit.synthesizers.bn_statistics import batch_norm_layers, tapped
from dreamkit.teachers import bundled
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.cifar import CifarTeacher
from dreamkit.teachers.cifar_networks import NETWORKS, build_network
from dreamkit.teachers.wide_resnet import WideResNet

# Millions of parameters as published for 10 classes (He et al. 2016, table 6; Zagoruyko and
# Komodakis 2016, tables 4 and 5; ResNet-18 and -34 as in common CIFAR code; the last ones
# counted by hand), BatchNorm layers, and the features' height where the classifier averages them.
PUBLISHED = {
    "resnet20": (0.27, 19, 8),
    "resnet32": (0.46, 31, 8),
    "resnet56": (0.85, 55, 8),
    "resnet18": (11.17, 20, 4),
    "resnet18_half": (2.80, 20, 4),
    "resnet34": (21.28, 36, 4),
    "vgg11_bn": (9.23, 8, 2),
    "wrn_40_2": (2.24, 37, 8),
    "wrn_40_1": (0.56, 37, 8),
    "wrn_16_1": (0.18, 13, 8),
    "wrn_16_2": (0.69, 13, 8),
    "mobilenetv2": (2.24, 52, 4),
    "vit": (1.21, 0, 8),
    "convnext": (1.43, 0, 1),
}
LARGE = {"resnet34"}
"""Half a second each on a slow machine for what resnet18 shows too."""


def test_every_network_is_held_against_what_is_published():
    assert set(PUBLISHED) == set(NETWORKS) == set(CifarTeacher.known_models(pretrained=False))
    assert CifarTeacher.known_models(pretrained=True) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_batch_norms_and_a_gradient_to_the_image(name):
    model = build_network(name).eval()
    millions, batch_norms, side = PUBLISHED[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    layers = batch_norm_layers(model)
    assert len(layers) == batch_norms
    assert [module for _, module in layers] == [
        module for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda m, i, out: seen.append(out.shape[2]))
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).requires_grad_()
    with tapped(model) as tap:
        logits, statistics = tap(images)
    assert logits.shape == (2, 10)
    assert len(statistics) == batch_norms, "every BatchNorm layer runs, once"
    assert seen[-1] == side
    (gradient,) = torch.autograd.grad(logits.square().sum(), [images])
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()


def test_parameters_counted_by_hand():
    def count(name):
        return sum(p.numel() for p in build_network(name).parameters())

    # 16·3·9 + 32; three stages of 3, 3, 3 blocks less the shortcuts; fc: 64·10 + 10.
    small = 432 + 32 + 6 * (2304 + 32) + 4608 + 5 * 9216 + 6 * 64
    assert count("resnet20") == small + 18432 + 5 * 36864 + 6 * 128 + 650
    # Convolutions with biases and BatchNorm, 3-64-128-256-256-512-512-512-512, and 512·10 + 10.
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    vgg = sum(a * b * 9 + 3 * b for a, b in itertools.pairwise(widths))
    assert count("vgg11_bn") == vgg + 5130
    # torchvision states 3,504,872 for mobilenet_v2 of 1000 classes on 1280 features.
    assert count("mobilenetv2") == 3_504_872 - 990 * 1281


def test_wide_resnet_by_hand():
    # One block a stage, one channel seen: every convolution passes its centre on, BatchNorm is
    # the identity, and so a block adds relu(relu(x)) to what its shortcut gives.
    model = WideResNet(10, 1, 2, in_channels=1).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
                module.weight[0, 0, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 2**-10  # torch may refuse 0
                module.running_var.fill_(1 - 2**-10)
        model.fc.weight.zero_()
        model.fc.weight[1, 0] = 1
        model.fc.bias.zero_()
        # Stage 1 has an identity: 3 → 3 + 3, -1 → 0 - 1. Stages 2 and 3 project what is activated:
        # 6 → 12 → 24, and 0 from there on where stage 1 left -1.
        assert model(torch.full((1, 1, 8, 8), 3.0)).tolist() == [[0, 24]]
        assert model(torch.full((1, 1, 8, 8), -1.0)).tolist() == [[0, 0]]
        assert model.layer1(model.conv1(torch.full((1, 1, 4, 4), -1.0)))[0, 0, 0, 0] == -1


@pytest.mark.parametrize("depth", [4, 9, 17])
def test_wide_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match="6n\\+4"):
        WideResNet(depth, 1, 10)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in {*LARGE, "vit"}])
def test_channels_can_be_removed_and_students_reload(name, tmp_path):
    entry = CifarTeacher(name, num_classes=5)
    teacher = entry.load(0)
    before = sum(p.numel() for p in teacher.model.parameters())
    graph = ChannelGraph(teacher.model, (3, 32, 32))
    groups, skipped = graph.groups()
    graph.remove({group.name: range(group.channels // 2) for group in groups})
    padded = name in {"resnet20", "resnet32", "resnet56"}
    # What padded shortcuts meet is one stream from the first convolution to the last, of three
    # widths; without it the insides of (depth - 2) / 2 blocks are left.
    assert len(skipped) == (4 if padded else 1)
    if padded:
        assert len(groups) == (int(name.removeprefix("resnet")) - 2) // 2
    # Half the channels are a quarter of most weights, or half where one end of a block stays.
    assert sum(p.numel() for p in teacher.model.parameters()) < (0.52 if padded else 0.3) * before
    write_artifact(
        tmp_path, teacher.model, teacher.card, teacher.builder, graph.pruning_record.to_json()
    )
    loaded = dreamkit.load_student(tmp_path)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), teacher.model(x))
    assert loaded.card == teacher.card


# --- the entry --------------------------------------------------------------------------------


def test_random_weights_and_the_card_of_cifar10():
    first = CifarTeacher("wrn_16_1").load(1)
    card = first.card
    assert (card.name, card.input_size, card.num_classes) == ("cifar/wrn_16_1", (3, 32, 32), 10)
    assert card.mean == (0.4914, 0.4822, 0.4465)
    assert card.std == (0.2470, 0.2435, 0.2616)
    assert (card.trained, card.origin, card.class_names) == (False, "random weights", None)
    assert not first.model.training
    before = torch.get_rng_state()
    assert CifarTeacher("wrn_16_1").load(1).card.weights_sha256 == card.weights_sha256
    assert CifarTeacher("wrn_16_1").load(2).card.weights_sha256 != card.weights_sha256
    assert torch.equal(torch.get_rng_state(), before)


def test_other_channels_sizes_and_classes():
    options = {"num_classes": 3, "input_size": (1, 16, 24), "mean": (0.5,), "std": (0.25,)}
    larger = options | {"input_size": (1, 32, 40)}
    for name in ("resnet20", "resnet18", "wrn_16_1", "mobilenetv2", "vgg11_bn"):
        teacher = CifarTeacher(name, **(larger if name == "vgg11_bn" else options)).load(0)
        with torch.no_grad():
            logits = teacher.model(torch.zeros(2, *teacher.card.input_size))
        assert logits.shape == (2, 3), name


CARD = {
    "name": "cifar/wrn_16_1",
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.5, 0.125),
    "num_classes": 3,
    "class_names": ("a", "b", "c"),
    "origin": "a command",
    "notes": {"test_accuracy": 0.5},
}


def saved(folder, stem="net", model="wrn_16_1"):
    """Write weights and their card as benchmarks/train_teacher.py does."""
    made = CifarTeacher("wrn_16_1", num_classes=3).load(1).model
    safetensors.torch.save_file(made.state_dict(), folder / f"{stem}.safetensors")
    architecture = {"model": model, "num_classes": 3, "in_channels": 3}
    content = {"architecture": architecture, "card": Card(**CARD).to_json()}
    (folder / f"{stem}.json").write_text(json.dumps(content))
    return made, str(folder / f"{stem}.safetensors")


def test_the_card_beside_the_weights(tmp_path):
    made, path = saved(tmp_path)
    teacher = CifarTeacher("wrn_16_1", path).load(0)
    card = teacher.card
    assert torch.equal(teacher.model.fc.weight, made.fc.weight)
    assert {key: getattr(card, key) for key in CARD} == CARD
    assert card.trained
    assert len(card.weights_sha256) == 64
    # A student of it is built without the file.
    options = {key: value for key, value in teacher.builder.items() if key != "source"}
    rebuilt = CifarTeacher(**options)
    assert rebuilt.weights is None
    rebuilt.build().load_state_dict(made.state_dict())
    # What a recipe gives stands before what the card says.
    other = CifarTeacher("wrn_16_1", path, mean=(0, 0, 0), class_names=("x", "y", "z")).load(0).card
    assert (other.mean, other.std, other.class_names) == ((0, 0, 0), CARD["std"], ("x", "y", "z"))


def test_weights_without_a_card_and_with_others_names(tmp_path):
    made = CifarTeacher("resnet20").load(1).model
    state = {f"module.{k.replace('fc.', 'linear.')}": v for k, v in made.state_dict().items()}
    assert "module.linear.weight" in state
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "resnet20.th")
    path = str(tmp_path / "resnet20.th")
    teacher = CifarTeacher("resnet20", path, "state_dict", "module.").load(0)
    assert torch.equal(teacher.model.fc.weight, made.fc.weight)
    assert (teacher.card.origin, teacher.card.num_classes) == (path, 10)
    with pytest.raises(WeightsMismatch, match=r"resnet20.th does not fit"):
        CifarTeacher("resnet32", path, "state_dict", "module.").load(0)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"model": "mobilenet_v2"}, "model", "did you mean 'mobilenetv2'"),
        ({"model": "resnet20", "weights": "default"}, "weights", "no path"),
        ({"model": "resnet20", "weights": "missing.pth"}, "weights", "no such file"),
        ({"model": "resnet20", "class_names": ("a", "b")}, "class_names", "2 names for 10"),
    ],
)
def test_refusals(options, option, message):
    with pytest.raises(OptionError, match=message) as caught:
        CifarTeacher(**options)
    assert caught.value.option == option


def test_mean_and_std_are_needed_for_other_channels():
    with pytest.raises(ValueError, match="one value for each of the 1 input channels"):
        CifarTeacher("resnet20", input_size=(1, 32, 32))


def test_a_card_of_another_network_or_none_at_all(tmp_path):
    _, path = saved(tmp_path, model="wrn_16_2")
    with pytest.raises(OptionError, match="its weights are of 'wrn_16_2'") as caught:
        CifarTeacher("wrn_16_1", path)
    assert caught.value.option == "model"
    for text in ("{", "[]", '{"card": {}}', '{"architecture": {"model": "wrn_16_1"}, "card": {}}'):
        (tmp_path / "net.json").write_text(text)
        with pytest.raises(OptionError, match=r"net.json cannot be read as the card") as caught:
            CifarTeacher("wrn_16_1", path)
        assert caught.value.option == "weights"


# --- bundled ----------------------------------------------------------------------------------


def test_a_bundled_cifar_network(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    made, _ = saved(tmp_path / "weights", "tiny_wrn")
    monkeypatch.setattr(bundled.resources, "files", lambda package: tmp_path)
    assert BundledTeacher.known_models(pretrained=True) == ["tiny_wrn"]
    teacher = BundledTeacher("tiny_wrn").load(0)
    assert torch.equal(teacher.model.fc.weight, made.fc.weight)
    assert (teacher.card.input_size, teacher.card.class_names) == ((3, 16, 16), ("a", "b", "c"))
    assert teacher.builder == {"source": "bundled", "model": "tiny_wrn"}
    assert isinstance(BundledTeacher("tiny_wrn").build(), WideResNet)


def test_the_names_of_classes_may_be_a_file(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n", encoding="utf-8")
    teacher = CifarTeacher("resnet20", num_classes=3, class_names=str(names)).load(0)
    assert teacher.card.class_names == ("ant", "bee", "cat")
    assert teacher.builder["class_names"] == ("ant", "bee", "cat"), "a student needs no such file"
    with pytest.raises(OptionError, match="3 names for 10 classes") as caught:
        CifarTeacher("resnet20", class_names=str(names))
    assert caught.value.option == "class_names"
