"""What a teacher's layers see of a batch: the only place that hooks its forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
        call = 1
        while (label := name if call == 1 else f"{name}#{call}") in self._seen:
            call += 1
        running_mean, running_var = module.running_mean, module.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        images = image_statistics(x, self._batch, len(running_mean)) if self.each_image else None
        mean, var = channel_statistics(x, running_mean) if images is None else pooled(images)
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


_TINY = 1e-20
"""Added to variances by the kernel: without it, it gives a constant channel an infinite one."""


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance that keep only their input for the backward pass, in its own type.

    Autograd's own would keep a float32 copy of every activation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        if torch.compiler.is_compiling():
            # Both sums and the cast become one pass. E[d²] - E[d]² is accurate, as d is centred
            # near its mean.
            difference = x.float() - near.view(_along_channels(x))
            offset = difference.mean(axes)
            var = (difference.square().mean(axes) - offset.square()).clamp(min=0)
            mean = near + offset
        elif x.device.type == "cpu":
            # The kernel of training-mode BatchNorm is many times as fast as var_mean; given float32
            # weights, it takes float32 statistics of inputs of fewer bits.
            kind = torch.promote_types(x.dtype, torch.float32)
            one, zero = x.new_ones(x.shape[1], dtype=kind), x.new_zeros(x.shape[1], dtype=kind)
            _, mean, inverse = torch.native_batch_norm(x, one, zero, None, None, True, 0.0, _TINY)
            var = (inverse.pow(-2) - _TINY).clamp(min=0)
        else:
            var, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, var_gradient: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        slope, offset = _gradient_line(mean_gradient, var_gradient, mean, x.numel() // x.shape[1])
        shape = _along_channels(x)
        return torch.addcmul(offset.view(shape), x, slope.view(shape)).to(x.dtype), None


@torch.library.custom_op("dreamkit::gradient_line", mutates_args=())
def _gradient_line(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return by channel the line, slope and offset, that the gradient in x is of x.

    An operation that the compiler cannot look into: it would compute these few numbers anew for
    every element of x.
    """
    slope = var_gradient * (2 / count)
    return slope, mean_gradient / count - slope * mean


@_gradient_line.register_fake
def _(
    mean_gradient: Tensor, var_gradient: Tensor, mean: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _along_channels(x: Tensor) -> tuple[int, ...]:
    """Return the shape that spreads a tensor (C,) over x (N, C, ...)."""
    return (1, -1, *[1] * (x.dim() - 2))


class SmoothedStatistics:
    """A moving average of layers' statistics over batches.

    Batches of a generator are less diverse than data are; it is their average that is to match the
    stored statistics (Fang et al., "Contrastive Model Inversion", IJCAI 2021, and FastDFKD). Before
    the first batch the stored statistics themselves stand for it.

    Args:
        rate: share of earlier batches, in [0, 1).
        layers: any batch's statistics, for what the layers have stored.
    """

    def __init__(self, rate: float, layers: tuple[LayerStatistics, ...]) -> None:
        self.rate = rate
        self._seen = {s.name: (s.running_mean.clone(), s.running_var.clone()) for s in layers}

    def blended(self, statistics: tuple[LayerStatistics, ...]) -> tuple[LayerStatistics, ...]:
        """Return a batch's statistics averaged with those of the batches before."""
        return tuple(self._blend(layer) for layer in statistics)

    def _blend(self, layer: LayerStatistics) -> LayerStatistics:
        before = self._seen[layer.name]
        mean = self.rate * before[0] + (1 - self.rate) * layer.mean
        var = self.rate * before[1] + (1 - self.rate) * layer.var
        return replace(layer, mean=mean, var=var)

    def update(self, statistics: tuple[LayerStatistics, ...]) -> None:
        """Take a finished batch's statistics into the average."""
        for layer in self.blended(statistics):
            self._seen[layer.name] = (layer.mean.detach().clone(), layer.var.detach().clone())

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return {f"{name}.{n}": v for name, pair in self._seen.items() for n, v in enumerate(pair)}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from an average."""
        self._seen = {
            name: (state[f"{name}.0"].to(device), state[f"{name}.1"].to(device))
            for name in self._seen
        }


@contextmanager
def tapped(model: nn.Module, each_image: bool = False) -> Iterator[BatchNormTap]:
    """Hook every BatchNorm layer of ``model`` for as long as the block lasts."""
    tap = BatchNormTap(model, each_image)
    with hooked(batch_norm_layers(model), tap.see):
        yield tap
