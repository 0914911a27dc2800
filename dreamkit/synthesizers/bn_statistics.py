"""What BatchNorm layers see of a batch: the only place that hooks a teacher's forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dreamkit.types import LayerStatistics


def batch_norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every layer that stores statistics of its input, in order of definition.

    Besides torch's own BatchNorm these are timm's ``BatchNormAct2d``, ``SyncBatchNorm`` and the
    frozen variants, which are no subclasses; instance norm is not one, its statistics are an
    image's own.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    ]


class BatchNormCapture:
    """Collects ``LayerStatistics`` of the latest forward pass, in forward order."""

    def __init__(self) -> None:
        self._layers: list[LayerStatistics] = []

    def take(self) -> tuple[LayerStatistics, ...]:
        """Return what the forward pass since the last call left, and forget it."""
        layers, self._layers = tuple(self._layers), []
        return layers

    def _see(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        dims = [0, *range(2, x.dim())]
        # One pass over the data, in float32 whatever the network computes in; biased (eq. 4).
        var, mean = torch.var_mean(x, dim=dims, correction=0)
        running_mean, running_var = module.running_mean, module.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        calls = sum(layer.name.partition("#")[0] == name for layer in self._layers)
        label = f"{name}#{calls + 1}" if calls else name  # a layer that is used more than once
        self._layers.append(LayerStatistics(label, mean, var, running_mean, running_var))


@contextmanager
def captured_statistics(model: nn.Module) -> Iterator[BatchNormCapture]:
    """Hook every BatchNorm layer of ``model`` for as long as the block lasts."""
    capture = BatchNormCapture()
    handles = [
        module.register_forward_pre_hook(partial(capture._see, name))
        for name, module in batch_norm_layers(model)
    ]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()
