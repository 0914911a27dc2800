"""What BatchNorm layers see of a batch: the only place that hooks a teacher's forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dreamkit.model_state import hooked
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


class BatchNormTap:
    """Runs a model and returns what its BatchNorm layers saw of that pass, in forward order.

    Passes that others run through the model in between leave no trace.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: dict[str, LayerStatistics] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[LayerStatistics, ...]]:
        """Return the model's logits (N, K) and the statistics of each layer."""
        self._seen = {}
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
        x = x.float()
        # One pass over the data, in float32 whatever the network computes in; biased (eq. 4).
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        running_mean, running_var = module.running_mean, module.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        self._seen[label] = LayerStatistics(label, mean, var, running_mean, running_var)


@contextmanager
def tapped(model: nn.Module) -> Iterator[BatchNormTap]:
    """Hook every BatchNorm layer of ``model`` for as long as the block lasts."""
    tap = BatchNormTap(model)
    with hooked(batch_norm_layers(model), tap.see):
        yield tap
