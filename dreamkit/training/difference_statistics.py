"""BatchNorm statistics of a network made from another: the other's, moved by what has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.moments import Moments

Kept = Mapping[str, Sequence[Sequence[int] | None]]
"""By name of a parameter or buffer, the positions kept of the teacher's on every axis, None for
all; what is not named is as the teacher's. ``PruningRecord.kept`` is one."""
BOUND = 16.0
"""How far a variance may go up or down, as a factor."""
Seen = Sequence[Mapping[str, Sequence[Moments]]]
"""What a network's BatchNorm layers see of some batches: for each, by name, every call's."""
_STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def seen_by(network: nn.Module, batches: NormalisedBatches) -> Seen:
    """Return what the BatchNorm layers of a network see, for differences from it to be taken of.

    Args:
        network: the teacher, in whatever mode; unchanged.
        batches: of images, where it is.
    """
    layers = [(n, m) for n, m in stating(network) if not isinstance(m, ScriptModule)]
    with eval_mode(network):
        return [_seen(network, layers, x) for x in batches]


def _seen(
    network: nn.Module, layers: Sequence[tuple[str, nn.Module]], x: Tensor
) -> dict[str, list[Moments]]:
    calls: dict[str, list[Moments]] = {}

    def watch(name: str, layer: nn.Module, x: Tensor) -> None:
        stored = len(layer.get_buffer(_STATISTICS[0]))
        calls.setdefault(name, []).append(Moments.of(x, stored))

    with hooked(layers, watch):
        network(x)
    return calls


@torch.no_grad()
def take_difference(
    student: nn.Module,
    teacher: nn.Module,
    kept: Kept,
    batches: NormalisedBatches,
    advance: Callable[[int], None] = lambda done: None,
    together: bool = True,
    seen: Seen | None = None,
) -> list[str]:
    """Give a network's BatchNorm layers its teacher's statistics, moved as far as it differs.

    Images that stand for the real ones (dreams) have nearly their statistics. Those taken on them
    anew lose a little of what the teacher knows of real images in each layer, and much in all. Here
    teacher and student are shown the same images, and the difference alone counts:

        mean = the teacher's + (mean the student sees - mean the teacher sees)
        variance = the teacher's · (variance the student sees / variance the teacher sees)

    with the factor of the variance held between 1/16 and 16, and 1 for a channel in which one of
    the two sees none. A layer has its new statistics before it passes a batch on, so that later
    layers see what is mended already. What is seen adds up over the batches: the means and
    variances are those of all images so far together (between batches too), not averages of the
    batches' own. So one batch gives the exact result, and several come near it: later layers saw
    the first of them mended by these alone. A layer that is called several times counts all calls.

    A student that computes what its teacher does gets its teacher's statistics, to the last bit.

    Args:
        student: changed in its running statistics alone; modes are kept.
        teacher: what it was made from; unchanged.
        kept: which of the teacher's channels the student's layers have.
        batches: of images, where both networks are.
        advance: told how many batches are done.
        together: whether every rank does the same, and is to have the first one's statistics, as
            ranks may differ in the last bit.
        seen: what the teacher sees of the batches, as ``seen_by`` tells; None for showing it them.

    Returns:
        Names of the layers left alone, wholly or in some calls: the teacher has none with these
        channels, or calls it less often, or they are in TorchScript and cannot be watched.
    """
    layers = dict(stating(student))
    theirs = {
        name: found
        for name, layer in layers.items()
        if (found := _statistics_of(teacher, name, layer, kept)) is not None
    }
    alone = dict.fromkeys(name for name in layers if name not in theirs)
    if not theirs:
        return list(alone)
    so_far: dict[str, tuple[Moments, Moments]] = {}
    calls: dict[str, list[Moments]] = {}

    def mend(name: str, layer: nn.Module, x: Tensor) -> None:
        if not calls.get(name):
            alone[name] = None
            return
        channels, found = _channels(kept, name, x.device), calls[name].pop(0)
        other = found if channels is None else found.chosen(channels)
        ours, others = so_far.get(name, (None, None))
        own = Moments.of(x, len(theirs[name][0]))
        so_far[name] = own.merged(ours), other.merged(others)
        _set(layer, *theirs[name], *so_far[name])

    watched = [(name, teacher.get_submodule(name)) for name in theirs]
    mended = [(name, layers[name]) for name in theirs]
    with eval_mode(student), eval_mode(teacher):
        for number, x in enumerate(batches):
            shown = _seen(teacher, watched, x) if seen is None else seen[number]
            calls = {name: list(moments) for name, moments in shown.items()}
            with hooked(mended, mend):
                student(x)
            advance(number + 1)
    if together:
        _agree(mended, batches.device)
    return list(alone)


def check_made_from(student: nn.Module, teacher: nn.Module, kept: Kept) -> None:
    """Refuse a student none of whose running statistics are of a layer that the teacher has.

    Raises:
        DreamkitError: it has such layers, and they are its own.
    """
    layers = [layer for layer in stating(student) if not isinstance(layer[1], ScriptModule)]
    if layers and all(_statistics_of(teacher, *layer, kept) is None for layer in layers):
        raise DreamkitError(
            "difference wants a student made from the teacher, and this one has none of its "
            "BatchNorm layers: choose keep or recalibrate",
            ("statistics",),
        )


def moved(mean: Tensor, variance: Tensor, ours: Moments, others: Moments) -> tuple[Tensor, Tensor]:
    """Return a layer's statistics (C,), moved by how what two networks see of images differs.

    Args:
        mean: the teacher's (C,).
        variance: the teacher's (C,).
        ours: what the student sees of the images.
        others: what the teacher does.
    """
    factor = (ours.variance / others.variance).clamp(1 / BOUND, BOUND)
    flat = (ours.squares <= 0) | (others.squares <= 0)
    # Subtracted, as a zero of the teacher's may have a sign.
    return mean - (others.mean - ours.mean), variance * torch.where(flat, 1.0, factor)


def stating(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that normalise by running statistics, frozen ones too, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, key, None), Tensor) for key in _STATISTICS)
    ]


def _statistics_of(
    teacher: nn.Module, name: str, layer: nn.Module, kept: Kept
) -> tuple[Tensor, Tensor] | None:
    """Return the teacher's mean and variance of a student's layer, if it has that layer."""
    try:
        module = teacher.get_submodule(name)
    except AttributeError:
        return None
    if isinstance(layer, ScriptModule) or isinstance(module, ScriptModule):
        return None
    found = []
    for key in _STATISTICS:
        tensor = getattr(module, key, None)
        if not isinstance(tensor, Tensor):
            return None
        channels = _channels(kept, name, tensor.device)
        if channels is not None:
            if int(channels.max()) >= len(tensor):
                return None
            tensor = tensor[channels]
        if tensor.shape != layer.get_buffer(key).shape:
            return None
        found.append(tensor.clone())
    return found[0], found[1]


def _channels(kept: Kept, name: str, device: torch.device) -> Tensor | None:
    axes = kept.get(f"{name}.{_STATISTICS[0]}")
    return None if axes is None or axes[0] is None else torch.tensor(axes[0], device=device)


def _set(layer: nn.Module, mean: Tensor, variance: Tensor, ours: Moments, others: Moments) -> None:
    """Set a layer's statistics to the teacher's, moved by the difference of what the two see."""
    for key, statistic in zip(_STATISTICS, moved(mean, variance, ours, others), strict=True):
        layer.get_buffer(key).copy_(statistic)


def _agree(layers: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
    """Give every rank the first one's statistics."""
    if distributed.size() == 1:
        return
    own = {f"{name}.{key}": layer.get_buffer(key) for name, layer in layers for key in _STATISTICS}
    for name, tensor in distributed.broadcast_tensors(own, device).items():
        own[name].copy_(tensor)
