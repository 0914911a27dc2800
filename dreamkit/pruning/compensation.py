"""What channels that go told the layers that read them, told by the channels that stay.

Where one channel is nearly a linear function of others, a layer that reads them all can do without
it: its weights of the others take over. Those that do so best are the Optimal Brain Surgeon's
(Hassibi and Stork, NeurIPS 1993) for the squared error of what the layer puts out; Mariet and Sra
("Diversity Networks", ICLR 2016) fuse neurons that are pruned likewise. Nothing but second moments
of what layers read is needed, which one pass of the network gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dreamkit.model_state import eval_mode, hooked
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
        total: (groups, C), sums.
        squares: (groups, C, C), sums of the products of channels.
    """

    count: int
    total: Tensor
    squares: Tensor

    def joined(self, other: Reading) -> Reading:
        """Return what both saw."""
        return Reading(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    def without(self, lost: Sequence[int]) -> Reading:
        """Return what is seen once some channels are gone, of each group the same."""
        kept = _others(self.total.shape[1], lost)
        return Reading(self.count, self.total[:, kept], self.squares[:, kept][:, :, kept])


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
    places = {name: _places(layer, name, groups) for name, layer in layers}
    found: dict[str, Reading] = {}
    odd: set[str] = set()
    samples: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        spread = places[name]
        if spread is None:
            return
        samples.setdefault(name, x[:2].clone())
        seen = _seen(layer, x.float(), spread)
        if seen is None:
            odd.add(name)
        else:
            found[name] = seen.joined(found[name]) if name in found else seen

    with eval_mode(model):
        with hooked(layers, see):
            for number, x in enumerate(batches, 1):
                model(x)
                advance(number)
        return {
            name: seen
            for name, seen in found.items()
            if name not in odd and _is_linear(model.get_submodule(name), samples[name])
        }


@torch.no_grad()
def compensate(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    seen: Readings,
    ridge: float,
    centred: bool,
) -> dict[str, Reading]:
    """Give layers the weights by which they do best without channels that are about to go.

    With x_L what a layer reads of the channels that go and x_K what it reads of the rest,
    P = argmin E‖x_L - Pᵀ x_K‖² + λ‖P‖², and W_K becomes W_K + W_L Pᵀ: one P for all places of a
    kernel. A layer with a bias makes up for the means too.

    Args:
        model: changed in place, with all its channels.
        groups: of the model.
        removed: channels by group, before they are removed.
        seen: by layer, of the model as it is.
        ridge: λ as a share of the channels' mean square, or variance.
        centred: whether something behind the layers makes up for means that shift, as BatchNorm's
            statistics do if they are taken anew.

    Returns:
        What the layers read from then on.
    """
    lost: dict[str, set[int]] = {}
    for group in groups:
        chosen = torch.tensor(sorted(removed.get(group.name, ())), dtype=torch.long)
        for member in group.members:
            if member.axis == "in" and member.layer in seen and len(chosen):
                inputs = member.index[torch.isin(member.channel, chosen)].tolist()
                lost.setdefault(member.layer, set()).update(inputs)
    after = dict(seen)
    for name, lacking in lost.items():
        layer, reading = model.get_submodule(name), seen[name]
        spread = _places(layer, name, groups)
        assert spread is not None
        channels = reading.total.shape[1]
        # Inputs of a grouped convolution's other groups fall on the same channels.
        gone = torch.isin(spread[:, 0], torch.tensor(sorted(lacking))).nonzero().flatten()
        out = (gone % channels).unique().tolist()
        if len(out) < channels:
            _take_over(layer, spread, reading, out, ridge, centred)
        after[name] = reading.without(out)
    return after


def _places(layer: nn.Module, name: str, groups: Sequence[ChannelGroup]) -> Tensor | None:
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


def _seen(layer: nn.Module, x: Tensor, spread: Tensor) -> Reading | None:
    """Return what one call of a layer reads; None if it is of another size than its weights."""
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
    # Sums of float32 over one batch; those over batches are of float64, which not all devices have.
    total, squares = rows.sum(2).cpu().double(), (rows @ rows.mT).cpu().double()
    return Reading(rows.shape[2], total, squares)


def _groups(layer: nn.Module) -> int:
    groups: int = getattr(layer, "groups", 1)
    return groups


def _is_linear(layer: nn.Module, x: Tensor) -> bool:
    """Whether twice the weights make a layer put out twice as much, but for its bias."""
    weight = layer.get_parameter("weight").detach()
    none, once, twice = (
        functional_call(layer, {"weight": weight * factor}, (x,)).float() for factor in (0, 1, 2)
    )
    return float((twice - 2 * once + none).norm()) <= _EXACT * float((once - none).norm())


def _others(channels: int, lost: Sequence[int]) -> Tensor:
    stays = torch.ones(channels, dtype=torch.bool)
    stays[list(lost)] = False
    return stays.nonzero().flatten()


def _take_over(
    layer: nn.Module,
    spread: Tensor,
    seen: Reading,
    lost: Sequence[int],
    ridge: float,
    centred: bool,
) -> None:
    """Add to the weights of what stays what it can tell of the rest, in place."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    mean, moments = seen.total / seen.count, seen.squares / seen.count
    if centred or bias is not None:
        moments = moments - mean[:, :, None] * mean[:, None]
    gone, kept = torch.tensor(list(lost)), _others(mean.shape[1], lost)
    size = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    pull = ridge * size[:, None, None] * torch.eye(len(kept), dtype=moments.dtype)
    right = moments[:, kept][:, :, gone]
    told = torch.linalg.solve(moments[:, kept][:, :, kept] + pull, right)  # (groups, kept, gone)
    groups, channels = mean.shape
    flat = weight.detach().cpu().double().flatten(2) if weight.dim() > 2 else None
    if flat is None:  # a linear layer's inputs, by channel
        flat = weight.detach().cpu().double()[:, spread]
    parts = flat.view(groups, len(weight) // groups, channels, -1)
    of_lost = parts[:, :, gone]
    added = torch.einsum("golp,gkl->gokp", of_lost, told)
    new = parts.clone()
    new[:, :, kept] += added
    new = new.view(flat.shape)
    if weight.dim() > 2:
        weight.copy_(new.view(weight.shape))
    else:
        filled = torch.empty_like(weight, dtype=torch.float64, device="cpu")
        filled[:, spread] = new
        weight.copy_(filled)
    if bias is not None:
        left = mean[:, gone] - (told * mean[:, kept, None]).sum(1)  # (groups, gone)
        shift = (of_lost.sum(3) * left[:, None]).sum(2).flatten()
        bias.add_(shift.to(bias))
