"""Learned steps: rounding to integers with a gradient to the step and to what is rounded.

Esser et al., Learned Step Size Quantization (ICLR 2020): v^ = round(clip(v / s, -Qn, Qp)) s, where
rounding passes gradients on as they are (eq. 1 to 3 and 5), and the gradient to s is scaled by
1 / sqrt(N Qp), N being how many values share the step (section 2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SMALLEST = 1e-12


class LearnedStep(nn.Module):
    """Rounds to integers, with a step that is learned and a zero point that stays.

    Args:
        step: to begin with, (), or (C,) for an axis of C channels.
        zero: integer that stands for 0, in the same shape.
        low: the smallest integer.
        high: the largest integer.
        axis: of the channels, where there are several steps.
        of_weights: values that share a step are all there are, not those of one image.
    """

    def __init__(
        self, step: Tensor, zero: Tensor, low: int, high: int, axis: int, of_weights: bool
    ) -> None:
        super().__init__()
        self.step = nn.Parameter(step.clone())
        self.zero: Tensor
        self.register_buffer("zero", zero.to(step.dtype))
        self.low, self.high, self.axis, self.of_weights = low, high, axis, of_weights
        self.reach = max(high - float(zero.max()), 1.0)
        """Qp: how many steps there are above 0."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the nearest integers within the limits times the step."""
        number = values.numel() / (self.step.numel() if self.of_weights else len(values))
        share = (number * self.reach) ** -0.5
        step = self._over(values, self.size)
        step = (step - share * step).detach() + share * step
        zero = self._over(values, self.zero)
        cut = torch.clamp(values / step, self.low - zero, self.high - zero)
        rounded: Tensor = (cut + (cut.round() - cut).detach()) * step
        return rounded

    @property
    def size(self) -> Tensor:
        """The step, above zero whatever it was moved to."""
        return self.step.clamp(min=_SMALLEST)

    def integers(self, values: Tensor) -> Tensor:
        """Return the nearest integers within the limits, as a file has them."""
        step, zero = self._over(values, self.size.detach()), self._over(values, self.zero)
        return ((values / step).round() + zero).clamp(self.low, self.high)

    def _over(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Return numbers of channels in a shape that spreads over the values."""
        if numbers.numel() == 1:
            return numbers.reshape(())
        shape = [1] * values.dim()
        shape[self.axis] = -1
        return numbers.view(shape)
