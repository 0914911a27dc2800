"""Means and variances of channels, over as many batches as come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Means and sums of squared deviations of channels' values.

    fvcore's precise BN takes E[x²] - E[x]² in float32, which turns negative for channels of large
    mean; these are merged as Chan et al. (1983) do.

    Args:
        count: values a channel.
        mean: (C,).
        squares: (C,), sums of the squared distances from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor, channels: int | None = None) -> Moments:
        """Return the moments of channels, float32 at the least.

        Args:
            x: (N, C, ...) or, as transformers have them, (N, ..., C).
            channels: C, by which the two are told apart; None for the first.
        """
        if channels is not None and x.shape[1] != channels and x.shape[-1] == channels:
            x = x.flatten(0, -2)
        x = x if x.dtype == torch.float64 else x.float()
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        return Moments(count, mean, var * count)

    def merged(self, earlier: Moments | None) -> Moments:
        """Return the moments of all values, these and earlier ones."""
        if earlier is None:
            return self
        total = earlier.count + self.count
        shift = self.mean - earlier.mean
        between = shift.square() * (earlier.count * self.count / total)
        squares = earlier.squares + self.squares + between
        return Moments(total, earlier.mean + shift * (self.count / total), squares)

    def chosen(self, channels: Tensor) -> Moments:
        """Return the moments of some channels, by their positions."""
        return Moments(self.count, self.mean[channels], self.squares[channels])

    @property
    def variance(self) -> Tensor:
        """Variances (C,), without Bessel's correction."""
        return self.squares / self.count
