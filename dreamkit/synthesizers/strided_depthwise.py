"""The backward pass of strided depthwise convolutions in bfloat16, where oneDNN has no fast one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class StridedDepthwise:
    """Takes those backward passes as ones of stride 1, for an evaluator in bfloat16 on a CPU.

    Of a depthwise convolution in bfloat16 oneDNN (3.x) has a backward pass for stride 1 alone; with
    another it falls back on plain loops, fifteen to sixty times as slow as float32's. What a
    convolution of stride s gives is every s-th row and column of what one of stride 1 does, so the
    gradient is spread out among zeros.

    Looking at every operation takes a moment: it is done until a pass has none of these.
    """

    def __init__(self) -> None:
        self.wanted = True
        """Whether the networks may have such convolutions; False after a pass without any."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Replace them in the block, a backward pass; nothing happens once none was met."""
        if not self.wanted:
            yield
            return
        mode = _Unstrided()  # type: ignore[no-untyped-call]
        with mode:
            yield
        self.wanted = mode.met


class _Unstrided(TorchDispatchMode):
    met = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.convolution_backward.default and _slow(*args):
            self.met = True
            args = _unstrided(*args)
        return func(*args, **(kwargs or {}))


def _slow(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> bool:
    depthwise = groups == x.shape[1] == weight.shape[0] > 1 and x.dim() == 4
    return gradient.dtype == torch.bfloat16 and depthwise and max(stride) > 1 and not transposed


def _unstrided(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *rest: Any,
) -> tuple[Any, ...]:
    """Return the arguments of the pass of stride 1 that gives the same."""
    height, width = (
        x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)
    )
    spread = torch.zeros(
        (*gradient.shape[:2], height, width),
        dtype=gradient.dtype,
        device=gradient.device,
    ).contiguous(memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    return spread, x, weight, bias_sizes, [1, 1], padding, dilation, *rest
