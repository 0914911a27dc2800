"""Rules of PyTorch's own layers that have weights of their channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dreamkit.pruning.computed import why_left
from dreamkit.types import ChannelCall, ChannelRule


class Convolution(ChannelRule):
    """Convolutions: grouped ones keep the same places of each group, depthwise ones their inputs.

    Transposed ones are left alone.
    """

    targets = (_ConvNd,)

    def follow(self, call: ChannelCall) -> Tensor | None:
        """Tell what becomes of the channels."""
        module, channels = call.target, call.channels[0]
        if module.transposed:
            call.fix(channels, f"{call.name} is transposed")
            return None
        if (reason := why_left(module)) is not None:
            return _left_alone(call, channels, module.out_channels, 1, reason)
        made = _axes(module, 0)
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            sizes = ("out_channels", "in_channels", "groups")
            return call.spread(call.holds(channels, 1, made, sizes), 1)
        read = call.holds(channels, 1, _axes(module, 1), ("in_channels",), axis="in")
        if module.groups > 1:
            call.couple_groups(read, module.groups)
        return call.makes(module.out_channels, 1, made, ("out_channels",), module.groups)


class Linear(ChannelRule):
    """Fully connected layers."""

    targets = (nn.Linear,)

    def follow(self, call: ChannelCall) -> Tensor:
        """Tell what becomes of the channels."""
        module, channels = call.target, call.channels[0]
        if (reason := why_left(module)) is not None:
            return _left_alone(call, channels, module.out_features, -1, reason)
        call.holds(channels, -1, _axes(module, 1), ("in_features",), axis="in")
        return call.makes(module.out_features, -1, _axes(module, 0), ("out_features",))


class Normalisation(ChannelRule):
    """Layers that scale, shift or normalise each channel, BatchNorm of other libraries included."""

    targets = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    _SIZES = ("num_features", "num_channels", "num_parameters", "normalized_shape")

    def follow(self, call: ChannelCall) -> Tensor:
        """Tell what becomes of the channels."""
        module, channels = call.target, call.channels[0]
        if parametrize.is_parametrized(module):
            call.fix(channels, str(why_left(module)))
            return channels
        own = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        if {tensor.numel() for tensor in own.values()} <= {0, 1}:
            return channels
        last = isinstance(module, nn.LayerNorm) and not type(module).__name__.endswith("2d")
        dim = channels.dim() - 1 if last else 1
        count = channels.shape[dim]
        if count not in {tensor.numel() for tensor in own.values()}:
            call.fix(channels, f"{call.name} normalises more than channels")
            return channels
        tensors = {k: 0 for k, t in own.items() if t.dim() == 1 and len(t) == count}
        sizes = [k for k in self._SIZES if getattr(module, k, None) in (count, (count,))]
        along = call.holds(channels, dim, tensors, sizes)
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            call.couple_groups(along, module.num_groups)
        return channels


def _axes(module: nn.Module, axis: int) -> dict[str, int]:
    """Return which of a layer's tensors have its outputs (axis 0) or its inputs (1).

    Beside weight and bias, layers of other libraries have tensors of their weight's shape, as
    masks, or with a number for each output, as the gains of weights that are standardised.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    found = {}
    for name, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        wide = [a for a, size in enumerate(tensor.shape) if size > 1]
        alike = tensor.shape == weight.shape
        each = tensor.shape[:1] == weight.shape[:1] and (wide == [0] or name == "bias")
        if alike or (axis == 0 and each):
            found[name] = axis
    return found


def _left_alone(call: ChannelCall, channels: Tensor, count: int, dim: int, reason: str) -> Tensor:
    """Return the channels that a layer makes which has to stay as it is, and so do its inputs."""
    call.fix(channels, f"{call.name} reads them, and {reason}")
    made = call.makes(count, dim, {})
    call.fix(made, reason)
    return made


BUILT_IN: tuple[ChannelRule, ...] = (Convolution(), Linear(), Normalisation())


def built_in_rule(module: nn.Module) -> ChannelRule | None:
    """Return the rule of one of PyTorch's layers, or of a BatchNorm by another name."""
    for rule in BUILT_IN:
        if isinstance(module, tuple(rule.targets)):
            return rule
    return BUILT_IN[-1] if isinstance(getattr(module, "running_mean", None), Tensor) else None
