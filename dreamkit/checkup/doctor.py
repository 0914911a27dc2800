"""What dreamkit can do with a teacher: invert it, prune it, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.cost import Cost, count
from dreamkit.pruning.graph import ChannelGraph, Skipped
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.report.tables import quantity
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import ChannelGroup, ChannelRule, Estimate, Teacher
from dreamkit.wording import duration, say

_STEPS = 2000


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about a teacher.

    Args:
        bn_layers: how many layers' statistics an inversion can match.
        uninvertible: why DeepInversion refuses it; None if it does not.
        inversion: what a batch takes.
        groups: that can be pruned.
        skipped: that cannot, with the reasons.
        unprunable: why its channels cannot be followed at all; None if they can.
        cost: parameters and FLOPs.
    """

    bn_layers: int
    uninvertible: str | None
    inversion: Estimate | None
    groups: list[ChannelGroup]
    skipped: list[Skipped]
    unprunable: str | None
    cost: Cost


def diagnose(
    teacher: Teacher,
    device: torch.device,
    batch_size: int,
    rules: Sequence[ChannelRule] = (),
) -> Diagnosis:
    """Look a teacher over.

    Args:
        teacher: on the CPU.
        device: where an inversion would run.
        batch_size: images that would be inverted together.
        rules: how plugins' layers and operations treat channels.
    """
    cost = count(teacher.model, teacher.card.input_size)
    groups: list[ChannelGroup] = []
    skipped: list[Skipped] = []
    unprunable = None
    try:
        groups, skipped = ChannelGraph(teacher.model, teacher.card.input_size, rules=rules).groups()
    except DreamkitError as error:
        unprunable = error.message
    uninvertible, inversion = None, None
    plan = DeepInversion(
        images=batch_size,
        batch_size=batch_size,
        stages=(Stage(steps=_STEPS),),
        regularizers=(Term("tv", 1e-4, TotalVariation()), Term("bn_feature", 1e-2, BNFeature())),
    )
    teacher.model.to(device)
    try:
        with plan.session(teacher, device) as dreamer:
            inversion = dreamer.prepare(batch_size)
    except DreamkitError as error:
        uninvertible = error.message
    finally:
        teacher.model.cpu()
    return Diagnosis(
        len(batch_norm_layers(teacher.model)),
        uninvertible,
        inversion,
        groups,
        skipped,
        unprunable,
        cost,
    )


def show_diagnosis(card: Card, found: Diagnosis, console: Console) -> None:
    """Print a diagnosis."""
    channels, height, width = card.input_size
    say(
        console,
        f"{card.name} ({card.origin}): {card.num_classes} classes, {channels}x{height}x{width}",
    )
    say(console, f"{quantity(found.cost.params)} parameters, {quantity(found.cost.flops)} FLOPs")
    if found.inversion is None:
        say(console, f"inversion: no. {found.uninvertible}")
    else:
        say(
            console,
            f"inversion: yes, {found.bn_layers} BatchNorm layers; {_STEPS} steps of a batch take "
            f"about {duration(found.inversion.seconds)} and "
            f"{found.inversion.memory_bytes / 2**30:.1f} GB here",
        )
    if found.unprunable is not None:
        say(console, f"pruning: no. {found.unprunable}")
        return
    total = sum(group.channels for group in found.groups)
    say(console, f"pruning: {len(found.groups)} channel groups, {total} channels")
    if found.skipped:
        table = Table("left alone", "why", title="What cannot be pruned", title_justify="left")
        for skipped in found.skipped:
            table.add_row(skipped.group, skipped.reason)
        console.print(table)
