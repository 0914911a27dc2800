"""What channels that go told the layers that read them, told by the channels that stay.

Where one channel is nearly a linear function of others, a layer that reads them all can do without
it: its weights of the others take over. Those that do so best are the Optimal Brain Surgeon's
(Hassibi and Stork, NeurIPS 1993) for the squared error of what the layer puts out; Mariet and Sra
("Diversity Networks", ICLR 2016) fuse neurons that are pruned likewise. Nothing but second moments
of what layers read is needed, which one pass of the network gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dreamkit.pruning.readings import Reading, Readings, others, places_of
from dreamkit.types import ChannelGroup


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
    kernel. A layer with a bias makes up for the means too. λ is more where values are few: by
    (channels left / values)², as of as many values as channels each is told by chance.

    Args:
        model: changed in place, with all its channels.
        groups: of the model.
        removed: channels by group, before they are removed.
        seen: by layer, of the model as it is.
        ridge: λ as a share of the channels' mean square, or variance.
        centred: whether BatchNorm's statistics are taken anew after the removal, so that a layer in
            front of one need not keep its means.

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
        spread = places_of(layer, name, groups)
        assert spread is not None
        channels = reading.total.shape[1]
        # Inputs of a grouped convolution's other groups fall on the same channels.
        gone = torch.isin(spread[:, 0], torch.tensor(sorted(lacking))).nonzero().flatten()
        out = (gone % channels).unique().tolist()
        if len(out) < channels:
            _take_over(layer, spread, reading, out, ridge, centred)
        after[name] = reading.without(out)
    return after


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
    moments = seen.moments(centred=bias is not None or (centred and seen.normalised))
    mean = seen.mean
    gone, kept = torch.tensor(list(lost)), others(mean.shape[1], lost)
    # Of as many values as channels each channel is told by chance; of many more none is.
    chance = (len(kept) / seen.count) ** 2
    size = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    pull = (ridge + chance) * size[:, None, None] * torch.eye(len(kept), dtype=moments.dtype)
    right = moments[:, kept][:, :, gone]
    told = torch.linalg.solve(moments[:, kept][:, :, kept] + pull, right)  # (groups, kept, gone)
    groups, channels = mean.shape
    flat = weight.detach().cpu()
    parts = flat if weight.dim() > 2 else flat[:, spread]  # a linear layer's inputs, by channel
    parts = parts.clone().view(groups, len(weight) // groups, channels, -1)
    of_lost = parts[:, :, gone].double()
    parts[:, :, kept] += torch.einsum("golp,gkl->gokp", of_lost, told).to(parts.dtype)
    if weight.dim() > 2:
        weight.copy_(parts.view(weight.shape))
    else:
        flat = flat.clone()
        flat[:, spread] = parts.view(len(weight), *spread.shape)
        weight.copy_(flat)
    if bias is not None:
        left = mean[:, gone] - (told * mean[:, kept, None]).sum(1)  # (groups, gone)
        shift = (of_lost.sum(3) * left[:, None]).sum(2).flatten()
        bias.add_(shift.to(bias))
