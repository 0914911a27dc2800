"""What the layers of a network read, as far as its channels can tell of one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dreamkit.model_state import eval_mode, hooked
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.pruning.activations import weighted_layers
from dreamkit.types import ChannelGroup

_WIDEST = 8192
"""Channels that a layer reads: the equations of more fill memory and take hours."""
_EXACT = 1e-2
"""Relative error of a layer that still is linear in its weights; TF32 is off by less."""


@dataclass(frozen=True)
class Reading:
    """What a layer reads, over as many images and places as came.

    A layer that reads several numbers of a channel side by side, as a linear one behind a
    flattened feature map does, has them as places. A grouped convolution's groups are apart.

    Args:
        count: values a channel.
        shift: (groups, C), taken off all values: near their means, as squares of large numbers that
            hardly vary tell nothing of how they do.
        total: (groups, C), sums.
        squares: (groups, C, C), sums of the products of channels.
        normalised: whether what the layer puts out is given to a layer with running statistics.
    """

    count: int
    shift: Tensor
    total: Tensor
    squares: Tensor
    normalised: bool = False

    @property
    def mean(self) -> Tensor:
        """Means (groups, C)."""
        return self.total / self.count + self.shift

    def moments(self, centred: bool) -> Tensor:
        """Return covariances, or the mean products of channels (groups, C, C)."""
        off = self.total / self.count
        moments = self.squares / self.count - off[:, :, None] * off[:, None]
        return moments if centred else moments + self.mean[:, :, None] * self.mean[:, None]

    def joined(self, earlier: Reading) -> Reading:
        """Return what both saw, with the shift of both."""
        total, squares = self.total + earlier.total, self.squares + earlier.squares
        normalised = self.normalised and earlier.normalised
        return Reading(self.count + earlier.count, self.shift, total, squares, normalised)

    def without(self, lost: Sequence[int]) -> Reading:
        """Return what is seen once some channels are gone, of each group the same."""
        kept = others(self.total.shape[1], lost)
        squares = self.squares[:, kept][:, :, kept]
        return replace(self, shift=self.shift[:, kept], total=self.total[:, kept], squares=squares)


Readings = Mapping[str, Reading]
"""By name of a layer."""


@torch.no_grad()
def readings(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Tensor],
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Reading]:
    """Return what the layers read that can make up for channels of some groups.

    These are convolutions and linear layers whose output is linear in weights of their own, which
    no other layer shares.

    Args:
        model: whose layers; it is in eval mode meanwhile.
        groups: of channels that may go.
        batches: normalised images (N, C, H, W), on the model's device.
        advance: told how many batches are done.
    """
    reading = {m.layer: m for group in groups for m in group.members if m.axis == "in"}
    owners = Counter(id(m._parameters.get("weight")) for m in model.modules())
    layers = [
        (name, layer)
        for name, layer in weighted_layers(model)
        if name in reading and owners[id(layer._parameters.get("weight"))] == 1
    ]
    places = {name: places_of(layer, name, groups) for name, layer in layers}
    found: dict[str, Reading] = {}
    odd: set[str] = set()
    samples: dict[str, Tensor] = {}
    made: list[tuple[str, Tensor]] = []

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        spread = places[name]
        if spread is None:
            return
        samples.setdefault(name, x[:2].clone())
        earlier = found.get(name)
        shift = None if earlier is None else earlier.shift
        seen = _seen(layer, x.float(), spread, shift)
        if seen is None:
            odd.add(name)
        else:
            found[name] = seen if earlier is None else seen.joined(earlier)

    def see_normalised(name: str, layer: nn.Module, x: Tensor) -> None:
        for maker, output in made:
            if output is x and maker in found:
                found[maker] = replace(found[maker], normalised=True)

    norms = [(name, m) for name, m in model.named_modules() if _has_statistics(m)]
    with eval_mode(model):
        with hooked(layers, see), hooked(norms, see_normalised), _outputs(layers, made):
            for number, x in enumerate(batches, 1):
                model(x)
                advance(number)
        made.clear()
        return {
            name: seen
            for name, seen in found.items()
            if name not in odd and _is_linear(model.get_submodule(name), samples[name])
        }


@contextmanager
def _outputs(
    layers: Sequence[tuple[str, nn.Module]], made: list[tuple[str, Tensor]]
) -> Iterator[None]:
    """Note what the last of some layers put out, with its name."""

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        made[:] = [(name, output)]  # of all layers they would fill memory

    with ExitStack() as stack:
        for name, layer in layers:
            stack.callback(layer.register_forward_hook(partial(note, name)).remove)
        yield


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor)


def places_of(layer: nn.Module, name: str, groups: Sequence[ChannelGroup]) -> Tensor | None:
    """Return the inputs of a layer that are of one channel, (channels, inputs a channel).

    None where channels have different numbers of them, or too many channels are read.
    """
    weight = layer._parameters.get("weight")
    if weight is None:  # computed from others
        return None
    inputs = weight.shape[1] * (layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1)
    spread = torch.arange(inputs)[:, None]
    if isinstance(layer, nn.Linear):
        of_channel: dict[tuple[str, int], list[int]] = {}
        for group in groups:
            for member in group.members:
                if member.layer == name and member.axis == "in":
                    for place, channel in zip(
                        member.index.tolist(), member.channel.tolist(), strict=True
                    ):
                        of_channel.setdefault((group.name, channel), []).append(place)
        # Channels that go together, of the groups of a convolution, are not side by side.
        runs = [run for places in of_channel.values() for run in _runs(sorted(places))]
        if {len(run) for run in runs} != {1}:
            if len({len(run) for run in runs}) != 1 or sum(map(len, runs)) != inputs:
                return None
            spread = torch.tensor(sorted(runs))
    return spread if len(spread) <= _WIDEST else None


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Return places, in order, as runs of neighbours."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _seen(
    layer: nn.Module, x: Tensor, spread: Tensor, shift: Tensor | None = None
) -> Reading | None:
    """Return what one call of a layer reads; None if it is of another size than its weights.

    Args:
        layer: a convolution or linear layer.
        x: what it is given.
        spread: as ``places_of`` returns it.
        shift: of earlier calls; None for the means of this one.
    """
    if isinstance(layer, nn.Linear):
        if x.shape[-1] != spread.numel():
            return None
        rows = x.flatten(0, -2)[:, spread.to(x.device).flatten()]
        rows = rows.view(len(rows), *spread.shape).permute(1, 0, 2).flatten(1)[None]
    else:
        groups, dims = _groups(layer), layer.get_parameter("weight").dim()
        if x.dim() != dims or x.shape[1] != len(spread):
            return None
        rows = x.transpose(0, 1).flatten(1).view(groups, len(spread) // groups, -1)
    shift = rows.mean(2).cpu().double() if shift is None else shift
    rows = rows - shift[:, :, None].to(rows)
    # Sums of float32 over one batch; those over batches are of float64, which not all devices have.
    total, squares = rows.sum(2).cpu().double(), (rows @ rows.mT).cpu().double()
    return Reading(rows.shape[2], shift, total, squares)


def _groups(layer: nn.Module) -> int:
    groups: int = getattr(layer, "groups", 1)
    return groups


def _is_linear(layer: nn.Module, x: Tensor) -> bool:
    """Whether twice the weights make a layer put out twice as much, but for its bias."""
    weight = layer.get_parameter("weight").detach()
    try:
        none, once, twice = (
            functional_call(layer, {"weight": weight * factor}, (x,)).float()
            for factor in (0, 1, 2)
        )
    except Exception as error:  # a forward of its own takes or returns what none of torch's does
        if is_out_of_memory(error):
            raise
        return False
    return float((twice - 2 * once + none).norm()) <= _EXACT * float((once - none).norm())


def others(channels: int, lost: Sequence[int]) -> Tensor:
    """Return the positions of channels that are not lost."""
    stays = torch.ones(channels, dtype=torch.bool)
    stays[list(lost)] = False
    return stays.nonzero().flatten()
