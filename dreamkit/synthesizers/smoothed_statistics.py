"""Statistics of layers averaged over batches, for batches that are less diverse than data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dreamkit.types import LayerStatistics


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
