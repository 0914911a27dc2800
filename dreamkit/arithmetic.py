"""Which precision a device computes in best, for those who leave it open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16"]


def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device.type == "cpu":
        # Older torch does not tell, and then float32 it is; ``bf16`` is ARM's name.
        known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return False


def resolve_precision(
    precision: Literal["auto"] | Precision,
    device: torch.device,
    model: nn.Module | None = None,
    inverted: bool = False,
) -> Precision:
    """Return the precision for a model, if given; ``auto`` is bfloat16 where that is faster.

    That is where the hardware multiplies it natively; but on a CPU the backward pass of strided
    depthwise convolutions is slower than in float32 by far. An inversion goes round it
    (``synthesizers/strided_depthwise``), unless they have more outputs than inputs, where it is
    twice as slow whatever the stride.
    """
    if precision != "auto":
        return precision
    modules = () if model is None else model.modules()
    slow = any(
        isinstance(m, nn.Conv2d)
        and m.groups == m.in_channels > 1
        and not (inverted and m.out_channels == m.in_channels)
        for m in modules
    )
    if device.type == "cpu" and slow:
        return "float32"
    return "bfloat16" if has_native_bfloat16(device) else "float32"


@contextmanager
def full_float32(precision: Precision, device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding float32 factors to TF32, which torch lets convolutions do.

    It concerns the whole process, and is as it was in the end. Nothing happens for bfloat16, on
    other devices, and where torch's newer settings (``fp32_precision``) are in use.
    """
    settings: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    if precision != "float32" or device.type != "cuda":
        settings = ()
    try:
        before = [setting.allow_tf32 for setting in settings]
    except RuntimeError:  # torch refuses to mix old and new settings
        settings, before = (), []
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def autocast(
    precision: Precision, device: torch.device, cache: bool = True
) -> AbstractContextManager[Any]:
    """Return the context in which networks compute in a precision.

    Args:
        precision: bfloat16 for matrix products and convolutions alone, or float32 for everything.
        device: where they compute.
        cache: keep the casts of weights for as long as the context lasts; of use only where
            weights need gradients.
    """
    context: AbstractContextManager[Any] = torch.autocast(
        device.type,
        getattr(torch, precision),
        enabled=precision != "float32",
        cache_enabled=cache,
    )
    return context
