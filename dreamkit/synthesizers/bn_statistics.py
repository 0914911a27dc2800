"""What a teacher's BatchNorm layers see of a batch: the only place that hooks them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dreamkit.model_state import hooked
from dreamkit.types import ImageStatistics, LayerStatistics


def batch_norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every layer that stores statistics of its input, in order of definition.

    Besides torch's own BatchNorm these are timm's ``BatchNormAct2d``, ``SyncBatchNorm`` and the
    frozen variants, which are no subclasses; instance norm is not one, its statistics are an
    image's own. A layer in TorchScript is none: it takes no hooks, by which it would be watched.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm | torch.jit.ScriptModule)
    ]


class BatchNormTap:
    """Runs a model and returns what its BatchNorm layers saw of that pass, in forward order.

    Passes that others run through the model in between leave no trace.

    Args:
        model: its layers are hooked by ``tapped``.
        each_image: have the statistics of each image too. They carry no gradient.
    """

    def __init__(self, model: nn.Module, each_image: bool = False) -> None:
        self.model = model
        self.each_image = each_image
        self._batch = 0
        self._seen: dict[str, LayerStatistics] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[LayerStatistics, ...]]:
        """Return the model's logits (N, K) and the statistics of each layer."""
        self._seen, self._batch = {}, len(images)
        try:
            logits = self.model(images)
            return logits, tuple(self._seen.values())
        finally:
            self._seen = None

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Note one layer's input; a layer that is used again is named ``name#2``."""
        if self._seen is None:
            return
        near = module.running_mean
        assert isinstance(near, Tensor)
        images = image_statistics(x, self._batch, len(near)) if self.each_image else None
        mean, var = channel_statistics(x, near) if images is None else pooled(images)
        self._note(name, module, mean, var, images)

    def normalise(self, name: str, module: _BatchNorm, input: Tensor) -> Tensor:
        """Do what a frozen layer of ``_known`` kind does, and note its input."""
        if self._seen is None or module.training:
            self.see(name, module, input)
            return type(module).forward(module, input)
        module._check_input_dim(input)
        stored = module.running_mean, module.running_var, module.weight, module.bias
        output, mean, var = _Normalised.apply(input, *stored, module.eps)
        self._note(name, module, mean, var)
        if type(module) not in _PLAIN:  # timm's
            output = cast(Any, module).act(cast(Any, module).drop(output))
        return cast(Tensor, output)

    def _note(
        self,
        name: str,
        module: nn.Module,
        mean: Tensor,
        var: Tensor,
        images: ImageStatistics | None = None,
    ) -> None:
        assert self._seen is not None
        call = 1
        while (label := name if call == 1 else f"{name}#{call}") in self._seen:
            call += 1
        running_mean, running_var = module.running_mean, module.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        self._seen[label] = LayerStatistics(label, mean, var, running_mean, running_var, images)


def channel_statistics(x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and biased variance over batch and positions (eq. 4).

    Args:
        x: (N, C, ...) or, as transformers have them, (N, ..., C); of any floating type.
        near: (C,), a value near the mean, for the accuracy of sums that are taken in one pass.

    Returns:
        Two tensors (C,), float32 whatever ``x`` is.
    """
    if x.shape[1] != len(near) and x.shape[-1] == len(near):
        x = x.flatten(0, -2)
    mean, var = _ChannelStatistics.apply(x, near)
    return mean, var


@torch.no_grad()
def image_statistics(x: Tensor, images: int, channels: int) -> ImageStatistics:
    """Return each image's mean and biased variance over positions, each (images, C), float32.

    Args:
        x: a layer's input, as of ``channel_statistics``. Where it has several rows for an image,
            as networks that cut images into windows make them, those of one stand together.
        images: in the batch.
        channels: of the layer.
    """
    if x.shape[1] != channels and x.shape[-1] == channels:
        x = x.movedim(-1, 1)
    rows = len(x) // images if len(x) % images == 0 else 1
    parts = x.float().reshape(-1, rows, channels, x[0, 0].numel()).transpose(1, 2)
    var, mean = torch.var_mean(parts.flatten(2), dim=2, correction=0)
    return ImageStatistics(mean, var)


def pooled(images: ImageStatistics) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of all images together, each (C,)."""
    spread, mean = torch.var_mean(images.mean, dim=0, correction=0)
    return mean, images.var.mean(0) + spread


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance that keep only their input for the backward pass, in its own type.

    Autograd's own would keep a float32 copy of every activation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _moments(x, near)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, var_gradient: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        slope, offset = _gradient_line(mean_gradient, var_gradient, mean, x.numel() // x.shape[1])
        return _by_channel(x, slope, offset), None


class _Normalised(torch.autograd.Function):
    """A frozen BatchNorm layer in eval mode together with the statistics of what it is given.

    The gradient in x is one expression of x and the gradient in the output. Apart, they take three
    passes more, and torch's own also sums up gradients for weights, which are frozen here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x, running_mean)
        scale = (running_var + eps).rsqrt()
        ctx.save_for_backward(x, mean, scale if weight is None else scale * weight)
        output = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
        return output, mean, var

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, mean_gradient: Tensor, var_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        slope, offset = _gradient_line(mean_gradient, var_gradient, mean, x.numel() // x.shape[1])
        scale = scale.to(x.dtype).view(_along_channels(x))
        along = _by_channel(x, slope, offset).addcmul_(gradient, scale)
        return along, None, None, None, None, None


def _moments(x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and biased variance, float32 or more."""
    axes = [0, *range(2, x.dim())]
    if torch.compiler.is_compiling():
        # Both sums and the cast become one pass. E[d²] - E[d]² is accurate, as d is centred
        # near its mean.
        difference = x.float() - near.view(_along_channels(x))
        offset = difference.mean(axes)
        var = (difference.square().mean(axes) - offset.square()).clamp(min=0)
        return near + offset, var
    if x.device.type == "cpu":
        # What updates running statistics is many times as fast as var_mean, and takes float32
        # ones of inputs of fewer bits if they are float32 themselves. These are thrown away.
        kind = torch.promote_types(x.dtype, torch.float32)
        running = x.new_zeros((2, x.shape[1]), dtype=kind)
        mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    else:
        var, mean = torch.var_mean(x.float(), dim=axes, correction=0)
    return mean, var


def _by_channel(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return x·scale + offset, channel by channel, in x's type but computed in float32."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # The kernel of BatchNorm in eval mode: arithmetic of two types would copy x.
        mean, var = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(x, mean, var, scale, offset, False, 0.0, 0.0)
    shape = _along_channels(x)
    return torch.addcmul(offset.view(shape), x, scale.view(shape)).to(x.dtype)


def _gradient_line(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return by channel the line, slope and offset, that the gradient in x is of x."""
    if torch.compiler.is_compiling():
        slope, offset = _closed_gradient_line(mean_gradient, var_gradient, mean, count)
        return slope, offset
    return _line(mean_gradient, var_gradient, mean, count)


def _line(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    slope = var_gradient * (2 / count)
    return slope, mean_gradient / count - slope * mean


@torch.library.custom_op("dreamkit::gradient_line", mutates_args=())
def _closed_gradient_line(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the line by an operation that the compiler cannot look into.

    It would compute these few numbers anew for every element of x. Calling it takes longer than
    the line does, so it is for the compiler alone.
    """
    return _line(mean_gradient, var_gradient, mean, count)


@_closed_gradient_line.register_fake
def _(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _along_channels(x: Tensor) -> tuple[int, ...]:
    """Return the shape that spreads a tensor (C,) over x (N, C, ...)."""
    return (1, -1, *[1] * (x.dim() - 2))


_PLAIN = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
"""Layers that are known to do nothing but normalise; what is derived from them may do more."""
_WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")
"""By name, as timm is imported where one of its networks is: normalises, drops out, activates."""


def _known(module: nn.Module) -> bool:
    kind = type(module)
    known = kind in _PLAIN or (kind.__module__, kind.__qualname__) == _WITH_ACTIVATION
    return known and "forward" not in vars(module)


@contextmanager
def tapped(model: nn.Module, each_image: bool = False) -> Iterator[BatchNormTap]:
    """Watch every BatchNorm layer of a frozen ``model`` for as long as the block lasts.

    Args:
        model: frozen.
        each_image: note the statistics of each image too; not for gradients.
    """
    tap = BatchNormTap(model, each_image)
    layers = batch_norm_layers(model)
    known = [layer for layer in layers if _known(layer[1]) and not each_image]
    others = [layer for layer in layers if layer not in known]
    try:
        for name, module in known:
            module.forward = partial(tap.normalise, name, cast(_BatchNorm, module))
        with hooked(others, tap.see):
            yield tap
    finally:
        for _, module in known:
            vars(module).pop("forward", None)
