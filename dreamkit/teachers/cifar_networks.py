"""The networks that papers on CIFAR use, by name; all take images of 32×32.

torchvision is imported where it is used: a saved student of another kind loads without it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.teachers.wide_resnet import WideResNet
from dreamkit.teachers.without_batch_norm import convnext, vision_transformer

Build = Callable[[int, int], nn.Module]
"""From the number of classes and of the images' channels to a network of random weights."""

# Expansion, channels, blocks and stride of each stage. The paper's second stage has stride 2.
_MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _small_resnet(depth: int, num_classes: int, in_channels: int) -> nn.Module:
    return SmallResNet(depth, num_classes, in_channels, shortcut="padded")


def _wide_resnet(depth: int, widen: int, num_classes: int, in_channels: int) -> nn.Module:
    return WideResNet(depth, widen, num_classes, in_channels)


def _imagenet_resnet(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Return torchvision's, with a 3×3 stem of stride 1 in place of 7×7 and max pooling."""
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, num_classes=num_classes)
    stem = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


def _half_resnet18(num_classes: int, in_channels: int) -> nn.Module:
    """Return ResNet-18 with half of its channels, for what the whole takes too long for."""
    from torchvision.models.resnet import BasicBlock

    model: Any = _imagenet_resnet("resnet18", num_classes, in_channels)
    model.conv1, model.bn1 = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
    model.inplanes = 32  # of the next layer to be made
    for number, width in enumerate((32, 64, 128, 256), start=1):
        layer = model._make_layer(BasicBlock, width, 2, stride=1 if number == 1 else 2)
        setattr(model, f"layer{number}", layer)
    model.fc = nn.Linear(256, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    made: nn.Module = model
    return made


def _vgg11_bn(num_classes: int, in_channels: int) -> nn.Module:
    """Return torchvision's features with one linear layer: its own three are for 7×7 features."""
    from torchvision.models import vgg

    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(
        OrderedDict(
            features=features,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(512, num_classes),
        )
    )


def _mobilenetv2(num_classes: int, in_channels: int) -> nn.Module:
    """Return torchvision's at an eighth of the input's size, not a thirty-second."""
    from torchvision.models import mobilenet_v2

    model: nn.Module = mobilenet_v2(
        weights=None,
        num_classes=num_classes,
        inverted_residual_setting=[list(stage) for stage in _MOBILENET_STAGES],
    )
    stem = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    model.set_submodule("features.0.0", stem)
    return model


NETWORKS: Mapping[str, Build] = MappingProxyType(
    {
        "resnet20": partial(_small_resnet, 20),
        "resnet32": partial(_small_resnet, 32),
        "resnet56": partial(_small_resnet, 56),
        "resnet18": partial(_imagenet_resnet, "resnet18"),
        "resnet18_half": _half_resnet18,
        "resnet34": partial(_imagenet_resnet, "resnet34"),
        "vgg11_bn": _vgg11_bn,
        "wrn_40_2": partial(_wide_resnet, 40, 2),
        "wrn_40_1": partial(_wide_resnet, 40, 1),
        "wrn_16_1": partial(_wide_resnet, 16, 1),
        "wrn_16_2": partial(_wide_resnet, 16, 2),
        "mobilenetv2": _mobilenetv2,
        # Both take less than 3 MB in float16. Of 64 patches:
        "vit": partial(vision_transformer, size=32, patch=4, width=128, depth=6, heads=4),
        # Two convolutions make 8x8 of the image, where half of the blocks are. Layer scale is for
        # deep networks; this one starts faster without.
        "convnext": partial(
            convnext,
            depths=(3, 3, 1, 1),
            widths=(64, 128, 192, 192),
            kernel=5,
            stem="overlap_act",
            layer_scale=False,
        ),
    }
)


def build_network(model: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return a network of ``NETWORKS`` with random weights."""
    return NETWORKS[model](num_classes, in_channels)
