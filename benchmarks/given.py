"""What benchmarks are given on their command lines: networks, and dreamkit's settings for them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from cifar_10 import cifar_checkpoint

from dreamkit.api.invert import synthesizer_options
from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.recipe import build_entry
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.labels import deal_labels
from dreamkit.teachers.intake import admit
from dreamkit.teachers.network_name import NetworkName, load_network
from dreamkit.types import BatchPlan, Teacher

NETWORK = (
    "a .th file of github.com/akamaster/pytorch_resnet_cifar10, or what 'dreamkit doctor' takes: "
    "SOURCE:MODEL, a recipe whose teacher is taken, a student's folder"
)


def given_network(text: str) -> Teacher:
    """Return the network that a benchmark is told of, on the CPU, named as it was told.

    Raises:
        SystemExit: there is none, or dreamkit cannot use it.
    """

    def note(words: str) -> None:
        print(f"{text}: {words}", file=sys.stderr)

    try:
        if Path(text).suffix == ".th":
            return cifar_checkpoint(Path(text))
        name = NetworkName("--teacher or --verifier", text, _weights(text))
        found, _ = load_network(name, build_registries)
    except DreamkitError as error:
        raise SystemExit(error.message) from error
    teacher = admit(found, note)
    return replace(teacher, card=replace(teacher.card, name=Path(text).stem))


def _weights(text: str) -> Literal["default"] | None:
    """Return trained ones for ``SOURCE:MODEL``; recipes and folders say it themselves."""
    return "default" if ":" in text and not Path(text).exists() else None


def default_settings(
    teacher: Teacher, images: int, batch: int | None = None, steps: int | None = None
) -> DeepInversion:
    """Return the settings of ``dreamkit.invert`` for a network.

    Args:
        teacher: the network.
        images: how many to dream.
        batch: dreamed together; None for the settings' own.
        steps: of a batch, over all stages; None for the settings' own.
    """
    # Mirrored in half of the steps where there are colours: photographs may be.
    given = {"images": images, "flip": teacher.card.input_size[0] == 3}
    given |= {} if batch is None else {"batch_size": min(batch, images)}
    entry = synthesizer_options(given, teacher, steps=steps)
    made: DeepInversion = build_entry(build_registries(), "synthesizers", entry)
    return made


def drawn_classes(card: Card, images: int, seed: int) -> tuple[int, ...]:
    """Return the classes that dreamkit deals out to as many images of a network's."""
    plan = BatchPlan(0, 0, images, seed)
    return tuple(deal_labels("balanced", card, seed, plan, torch.Generator()).tolist())
