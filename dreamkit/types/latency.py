"""How long layers and networks take on a target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """A layer at one input: the key of a latency look-up table.

    ``kind`` is ``conv``, ``linear`` or ``norm``: a BatchNorm of ``c_out`` channels, together with
    the activation module that follows it.
    """

    kind: str
    c_in: int
    c_out: int
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False
    feature_map: tuple[int, ...] = ()
    activation: str = ""

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a filter of its own."""
        return self.kind == "conv" and self.groups > 1 and self.groups == self.c_in == self.c_out

    @property
    def params(self) -> int:
        """Weights and biases."""
        if self.kind == "norm":
            return 2 * self.c_out
        weights = self.c_in // self.groups * self.c_out * math.prod(self.kernel)
        return weights + (self.c_out if self.bias else 0)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Height and width of what a convolution puts out."""
        axes = (self.feature_map, self.kernel, self.stride, self.padding, self.dilation)
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*axes, strict=True)
        )

    @property
    def flops(self) -> int:
        """Multiply-adds for one image, each counted once; those of a BatchNorm are not."""
        if self.kind == "norm":
            return 0
        spots = math.prod(self.output_size) if self.kind == "conv" else 1
        return spots * self.c_in // self.groups * self.c_out * math.prod(self.kernel)

    def without(self, axis: str, channels: int) -> LayerShape:
        """Return the shape with fewer channels on one axis; depthwise layers lose on both."""
        if self.kind == "norm":
            left = max(self.c_out - channels, 1)
            return replace(self, c_in=left, c_out=left)
        if self.depthwise:
            left = self.c_out if axis == "in" else max(self.c_out - channels, 1)
            return replace(self, c_in=left, c_out=left, groups=left)
        if axis == "out":
            return replace(self, c_out=max(self.c_out - channels, 1))
        return replace(self, c_in=max(self.c_in - channels, 1))


class LatencyTable(Protocol):
    """Predicts how long a model takes on the target.

    ``block`` is how many channels the target computes together.
    """

    block: int

    def prepare(self, shapes: Iterable[LayerShape]) -> None:
        """Measure what predicting these layers asks for, together rather than one by one."""

    def predict(self, shape: LayerShape) -> float:
        """Return one layer's latency in milliseconds."""

    def shapes(self, model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
        """Return the shape of every layer of a model that counts, by name."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per forward pass: the median, and the interquartile range."""

    median_ms: float
    spread_ms: float


class LatencyBackend(ABC):
    """An entry of ``latency_backends``: a way to time modules on a device and runtime.

    It has the option ``batch_size``: images in a forward pass.
    """

    batch_size: int

    @property
    def folds_norms(self) -> bool:
        """Whether the runtime folds BatchNorm into convolutions, so that it costs nothing."""
        return False

    @property
    def channel_block(self) -> int:
        """Channels that are computed together (>= 1); a layer that does not fill them is slower."""
        return 1

    @property
    def channel_multiple(self) -> int:
        """The multiple of channels (>= 1, a power of 2) that pruning keeps to by default.

        More than 1 says that kernels are so much slower on other counts that few are worth it.
        """
        return 1

    def remark(self, model: nn.Module, example: Tensor) -> str | None:
        """Return what the user must know of how a network is timed, if there is anything."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return what the figures hold for: processor, runtime, dtype, threads, batch."""

    @abstractmethod
    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its input, in turn within one run."""
