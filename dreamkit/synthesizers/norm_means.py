"""What a teacher's LayerNorm and GroupNorm layers make of a batch: this alone hooks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.model_state import eval_mode, hooked
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import NormMeans, Teacher


def norm_layers(teacher: Teacher) -> list[str]:
    """Return the layers that normalise across channels and then scale and shift each of them.

    These are LayerNorm over channels alone, whichever axis they are, and GroupNorm of several
    channels a group: what normalises each channel by itself leaves no mean of it to look at.

    Returns:
        Names of those that an image passes, in forward order; none for a network of TorchScript,
        which takes no hooks.
    """
    model = teacher.model
    if isinstance(model, torch.jit.ScriptModule):
        return []
    layers = [(name, module) for name, module in model.named_modules() if _shifts(module)]
    found: dict[str, None] = {}
    with (
        torch.no_grad(),
        eval_mode(model),
        hooked(layers, lambda name, module, x: found.update({name: None})),
    ):
        model(blank_noise(model, teacher.card.input_size))
    return list(found)


def _shifts(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        across = len(module.normalized_shape) == 1
    elif isinstance(module, nn.GroupNorm):
        across = module.num_groups < module.num_channels
    else:
        return False
    return across and isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor)


class NormTap:
    """Keeps what such layers make of their inputs in a pass of a model, from ``begin`` on.

    Passes that others run through the model leave no trace.
    """

    def __init__(self) -> None:
        self._seen: list[NormMeans] | None = None

    def begin(self) -> None:
        """Begin to note: the next pass is looked at."""
        self._seen = []

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Note one layer's input, normalised; what the layer puts out may be activated already."""
        if self._seen is None:
            return
        scale = module.weight
        assert isinstance(scale, Tensor)
        mean = _normalised(module, x.float()).mean(dim=0)
        self._seen.append(NormMeans(name, mean, scale.detach().float()))

    def means(self) -> tuple[NormMeans, ...]:
        """Return what was seen since ``begin``, in forward order, and look no longer."""
        found = tuple(self._seen or ())
        self._seen = None
        return found


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer makes of its input before scale and shift, (everything else, C)."""
    if isinstance(module, nn.GroupNorm):
        channels_first = F.group_norm(x, module.num_groups, eps=module.eps)
        return channels_first.transpose(0, 1).flatten(1).T
    assert isinstance(module, nn.LayerNorm)
    (channels,) = module.normalized_shape
    # Those over maps transpose them; where a map is as wide as it has channels the name tells.
    over_maps = "2d" in type(module).__name__.lower()
    if x.shape[-1] != channels or (over_maps and x.shape[1] == channels):
        x = x.movedim(1, -1)
    return F.layer_norm(x, (channels,), eps=module.eps).flatten(0, -2)


@contextmanager
def means_of(model: nn.Module, layers: Sequence[str]) -> Iterator[NormTap]:
    """Hook some layers for as long as the context lasts, to see what they make of a batch."""
    tap = NormTap()
    with hooked([(name, model.get_submodule(name)) for name in layers], tap.see):
        yield tap
