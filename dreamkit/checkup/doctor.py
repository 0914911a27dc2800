"""What dreamkit can do with a teacher: invert it, prune it, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from dreamkit.errors import DreamkitError
from dreamkit.evaluation.cost import Cost, count
from dreamkit.pruning.graph import ChannelGraph, Skipped
from dreamkit.report.tables import quantity
from dreamkit.synthesizers.automatic_terms import terms_for, told
from dreamkit.synthesizers.block_outputs import feature_blocks
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import needed
from dreamkit.synthesizers.stage import DEFAULT_STEPS
from dreamkit.teachers.intake import admit
from dreamkit.types import ChannelGroup, ChannelRule, Estimate, Teacher
from dreamkit.wording import duration, one_line, say


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
        cost: parameters and FLOPs; None if they cannot be counted.
    """

    bn_layers: int
    uninvertible: str | None
    inversion: Estimate | None
    groups: list[ChannelGroup]
    skipped: list[Skipped]
    unprunable: str | None
    cost: Cost | None


def diagnose(
    teacher: Teacher,
    device: torch.device,
    batch_size: int,
    rules: Sequence[ChannelRule] = (),
    console: Console | None = None,
) -> Diagnosis:
    """Look a teacher over, and say what is found as it is found, the quickest first.

    Args:
        teacher: on the CPU.
        device: where an inversion would run.
        batch_size: images that would be inverted together.
        rules: how plugins' layers and operations treat channels.
        console: where it is said; None says nothing.

    Raises:
        TeacherMismatch: dreamkit cannot work with its network at all.
    """
    console = console or Console(quiet=True)
    card = teacher.card
    size = "x".join(map(str, card.input_size))
    say(console, f"{card.name} ({card.origin}): {card.num_classes} classes, {size}")
    params = sum(parameter.numel() for parameter in teacher.model.parameters())
    say(console, f"{quantity(params)} parameters")
    with console.status("taking it in"):
        teacher = admit(teacher, partial(say, console), "its network")
    with console.status("counting its FLOPs"):
        cost = _cost(teacher, console)
    with console.status("following its channels"):
        groups, skipped, unprunable = _channels(teacher, rules)
    _show_pruning(groups, skipped, unprunable, console)
    with console.status("timing steps of an inversion"):
        inversion, uninvertible = _inversion(teacher, device, batch_size)
    bn_layers = len(batch_norm_layers(teacher.model))
    if inversion is None:
        say(console, f"inversion: no. {uninvertible}")
    else:
        say(
            console,
            f"inversion: yes, {_means(teacher)}; {DEFAULT_STEPS} steps of a batch take "
            f"about {duration(inversion.seconds)} and "
            f"{inversion.memory_bytes / 2**30:.1f} GB here",
        )
    return Diagnosis(bn_layers, uninvertible, inversion, groups, skipped, unprunable, cost)


def _means(teacher: Teacher) -> str:
    """Return what a teacher that can be inverted is inverted by."""
    bn_layers = len(batch_norm_layers(teacher.model))
    terms = terms_for("auto", teacher)
    if "bn_statistics" in needed(terms):
        return f"{bn_layers} BatchNorm layers"
    return (
        f"without BatchNorm: by {told(terms)}, of what {len(feature_blocks(teacher))} blocks or "
        "layers put out"
    )


def _cost(teacher: Teacher, console: Console) -> Cost | None:
    try:
        cost = count(teacher.model, teacher.card.input_size)
    except Exception as error:  # torch.jit.trace runs anyone's code, and cannot run all of it
        say(console, f"FLOPs: unknown. {one_line(error)}")
        return None
    say(console, f"{quantity(cost.flops)} FLOPs")
    return cost


def _channels(
    teacher: Teacher, rules: Sequence[ChannelRule]
) -> tuple[list[ChannelGroup], list[Skipped], str | None]:
    """Return what can be pruned, what cannot, and why nothing can be followed, if so."""
    try:
        graph = ChannelGraph(teacher.model, teacher.card.input_size, rules=rules)
    except DreamkitError as error:
        return [], [], error.message
    return *graph.groups(), None


def _inversion(
    teacher: Teacher, device: torch.device, batch_size: int
) -> tuple[Estimate | None, str | None]:
    """Return what an inversion costs, or why there is none."""
    plan = DeepInversion(
        images=batch_size,
        batch_size=batch_size,
        engine=Engine(compile=False),
    )
    teacher.model.to(device)
    try:
        with plan.session(teacher, device) as dreamer:
            return dreamer.prepare(batch_size), None
    except DreamkitError as error:
        return None, error.message
    finally:
        teacher.model.cpu()


def _show_pruning(
    groups: Sequence[ChannelGroup],
    skipped: Sequence[Skipped],
    unprunable: str | None,
    console: Console,
) -> None:
    if unprunable is not None:
        say(console, f"pruning: no. {unprunable}")
        return
    total = sum(group.channels for group in groups)
    say(console, f"pruning: {len(groups)} channel groups, {total} channels")
    if skipped:
        table = Table("left alone", "why", title="What cannot be pruned", title_justify="left")
        for left in skipped:
            table.add_row(left.group, left.reason)
        console.print(table)
