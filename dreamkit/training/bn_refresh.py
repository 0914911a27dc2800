"""Letting BatchNorm state what it is given, while the network computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from dreamkit import distributed
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.difference_statistics import moved, stating
from dreamkit.training.moments import Moments

_DEAD = 1e-3
"""Share of its former variance below which a channel is taken for dead."""
_Advance = Callable[[int], None]


@torch.no_grad()
def refresh(
    model: nn.Module,
    old: nn.Module | None,
    replay: NormalisedBatches,
    added: NormalisedBatches,
    share: float,
    advance: _Advance = lambda done: None,
) -> None:
    """Let every BatchNorm of a network that has learnt new classes state what it is given of all.

    A network that was trained with its running statistics frozen no longer sees what they say, and
    dreams of it would be held to what it was. What it sees of the new classes is measured on their
    images. Of the old ones there are only images that stand for them: what the network was before
    states real images' statistics, and these move by what the two networks see differently of the
    images that are there (``moved``). Both networks are as they are while they are looked at.

    Scale and shift then make up for the difference: γ' = γ σ'/σ, β' = β + γ (μ' - μ) / σ. Layers
    without scale or shift stay as they are, and so do channels that hardly vary any more.

    Args:
        model: changed in its BatchNorm layers alone; modes are kept.
        old: what it was made from, with layers of the same names; None where the old classes'
            images are real: then their own statistics count.
        replay: batches of what stands for images of the old classes.
        added: batches of images of the new classes.
        share: of all classes, those that are old.
        advance: told how many batches are done; ``old`` is shown those of ``replay`` too.
    """
    layers = {name: layer for name, layer in stating(model) if _scales(layer)}
    ours = _seen(model, layers, replay, advance)
    new = _seen(model, layers, added, lambda done: advance(len(replay) + done))
    theirs = {}
    if old is not None:
        first = len(replay) + len(added)
        theirs = _seen(old, layers, replay, lambda done: advance(first + done))
    found = {}
    for name in ours.keys() & new.keys():
        before = ours[name].mean, ours[name].variance
        if old is not None and name in theirs:
            layer = old.get_submodule(name)
            stated = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
            before = moved(*stated, ours[name], theirs[name])
        found[name] = _mixed(before, (new[name].mean, new[name].variance), share)
    # Ranks may differ in the last bit, and are to have one network.
    told = distributed.broadcast({k: (m.cpu(), v.cpu()) for k, (m, v) in found.items()})
    for name, (mean, variance) in told.items():
        _state(layers[name], mean, variance)


def _seen(
    model: nn.Module, names: Iterable[str], batches: NormalisedBatches, advance: _Advance
) -> dict[str, Moments]:
    """Return the moments of what layers are given, of those that are reached."""
    seen: dict[str, Moments] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        channels = len(layer.get_buffer("running_mean"))
        seen[name] = Moments.of(x, channels).merged(seen.get(name))

    named = [(name, model.get_submodule(name)) for name in names]
    with eval_mode(model), hooked(named, see):
        for number, x in enumerate(batches, 1):
            model(x)
            advance(number)
    return seen


def _mixed(
    some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], share: float
) -> tuple[Tensor, Tensor]:
    """Return mean and variance (C,) of all values, of which ``share`` have the first ones."""
    (mean, variance), (other_mean, other_variance) = some, others
    between = share * (1 - share) * (mean - other_mean).square()
    return (
        share * mean + (1 - share) * other_mean,
        share * variance + (1 - share) * other_variance + between,
    )


def _state(layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Give a layer running statistics (C,), and let it compute what it did."""
    scale, shift, old_mean, old_variance = (
        getattr(layer, name) for name in ("weight", "bias", "running_mean", "running_var")
    )
    mean, variance = mean.to(old_mean), variance.to(old_variance)
    # A channel that these images leave dead would be blown up as soon as one wakes it.
    dead = variance < _DEAD * old_variance
    mean = torch.where(dead, old_mean, mean)
    variance = torch.where(dead, old_variance, variance)
    eps = float(layer.eps)  # type: ignore[arg-type]
    deviation = (old_variance + eps).sqrt()
    shift.add_(scale * (mean - old_mean) / deviation)
    scale.mul_((variance + eps).sqrt() / deviation)
    old_mean.copy_(mean)
    old_variance.copy_(variance)


def _scales(layer: nn.Module) -> bool:
    """Whether a layer has scale and shift, and can be watched."""
    own = (getattr(layer, name, None) for name in ("weight", "bias"))
    return (
        not isinstance(layer, ScriptModule)
        and hasattr(layer, "eps")
        and all(isinstance(tensor, Tensor) for tensor in own)
    )
