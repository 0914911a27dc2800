"""The device that a run works on."""

from __future__ import annotations

import torch

from dreamkit.distributed import local_rank, size
from dreamkit.errors import DreamkitError


def choose_device(name: str) -> torch.device:
    """Return the device a recipe asks for; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        DreamkitError: torch does not see the device that was asked for.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank()) if size() > 1 else torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    seen = {"cpu": True, "mps": torch.backends.mps.is_available()}
    available = seen.get(device.type, (device.index or 0) < torch.cuda.device_count())
    if not available:
        raise DreamkitError(f"torch sees no device '{name}'; use auto or cpu", ("device",))
    return device
