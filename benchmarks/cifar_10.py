"""What several benchmarks share: ResNets for CIFAR-10, and settings that dream well from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from plain_loop import paper_settings
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.teachers.checkpoint_file import read_checkpoint
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.teachers.weights import find_states, hash_weights, load_into
from dreamkit.types import Teacher


def tuned_pixels(batch: int, steps: int) -> DeepInversion:
    """Return settings tuned on ResNet-20, with which pixels stay in the valid range."""
    return replace(
        paper_settings(batch, steps),
        regularizers=(
            Term("tv", 1e-3, TotalVariation()),
            Term("bn_feature", 1.0, BNFeature("paper")),
        ),
        lr=0.1,
        betas=(0.7, 0.9),
        schedule="cosine",
        clip=True,
    )


def tuned_fourier(batch: int, steps: int) -> DeepInversion:
    """Return settings tuned on ResNet-20 over Fourier coefficients."""
    return replace(
        tuned_pixels(batch, steps),
        regularizers=(Term("bn_feature", 30.0, BNFeature()),),
        parameterisation=Fourier(),
    )


def settle_statistics(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Give a network of random weights the running statistics that it has on noise.

    With those it begins with, activations grow from layer to layer to where bfloat16 means nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.momentum = None  # averages over all batches
        layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(torch.randn(16, *size))
    return model.eval()


def depth_of(state: dict[str, Tensor]) -> int:
    """Return the depth 6n+2 of a ResNet's state dict, which has n blocks a stage."""
    blocks = {name.split(".")[1] for name in state if name.startswith("layer1.")}
    return 6 * len(blocks) + 2


def cifar_checkpoint(weights: Path) -> Teacher:
    """Return the ResNet that a checkpoint holds, whatever its depth.

    Args:
        weights: a ``.th`` file of github.com/akamaster/pytorch_resnet_cifar10.
    """
    state = find_states(str(weights), read_checkpoint(weights), "state_dict")["state_dict"]
    renamed = {
        name.removeprefix("module.").replace("linear.", "fc."): value
        for name, value in state.items()
    }
    depth = depth_of(renamed)
    model = SmallResNet(depth, 10, shortcut="padded")
    load_into(model, renamed, str(weights))
    return _teacher(model, depth, str(weights))


def random_resnet(depth: int) -> Teacher:
    """Return the option-A ResNet for CIFAR-10 with random weights, and statistics that fit them."""
    model = SmallResNet(depth, 10, shortcut="padded")
    return _teacher(settle_statistics(model, (3, 32, 32)), depth, None)


def _teacher(model: nn.Module, depth: int, origin: str | None) -> Teacher:
    card = Card(
        name=f"resnet{depth}",
        input_size=(3, 32, 32),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_classes=10,
        origin=origin or "random weights",
        trained=origin is not None,
        weights_sha256=hash_weights(model),
    )
    return Teacher(model.eval(), card, {})
