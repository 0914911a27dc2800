"""How a student's weights lie in memory while it is trained."""

from __future__ import annotations

import torch
from torch import nn

from dreamkit.arithmetic import resolve_precision
from dreamkit.training.options import Training

_BLOCK = 16
"""Channels of a block of oneDNN's, at the most."""


def lay_out(student: nn.Module, options: Training, device: torch.device) -> None:
    """Lay a student's weights out as its training reads them fastest."""
    low = resolve_precision(options.precision, device, student) == "bfloat16"
    if low and not overruns(student, device):
        student.to(memory_format=torch.channels_last)


def overruns(student: nn.Module, device: torch.device) -> bool:
    """Whether a layer's gradient may spoil memory where channels are last.

    On a CPU oneDNN writes beyond what it has for the weights of strided 1x1 convolutions with fewer
    inputs than its blocks have (uxlfoundation/oneDNN, issue 6035, open in November 2026): shortcuts
    of networks that pruning left thin. It is told and was seen of AVX2, whose blocks have 8; those
    of AVX-512 have 16.

    Args:
        student: to be trained.
        device: where.
    """
    return device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < _BLOCK
        for module in student.modules()
    )
