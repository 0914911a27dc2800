"""The device that a run works on, and what times models there."""

from __future__ import annotations

import torch

from dreamkit.distributed import local_rank, size
from dreamkit.errors import DreamkitError
from dreamkit.recipe.schema import check_device
from dreamkit.registry import Registries
from dreamkit.types import LatencyBackend


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device a recipe asks for; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        DreamkitError: no device is called that, or torch does not see it.
    """
    name = str(name)
    try:
        check_device(name)
    except ValueError as error:
        raise DreamkitError(f"device: {error} (got {name!r})") from error
    if name == "auto":
        if torch.cuda.is_available():
            return _own_gpu()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    seen = {"cpu": True, "mps": torch.backends.mps.is_available()}
    available = seen.get(device.type, (device.index or 0) < torch.cuda.device_count())
    if not available:
        raise DreamkitError(f"torch sees no device '{name}'; use auto or cpu", ("device",))
    return _own_gpu() if device.type == "cuda" and device.index is None else device


def _own_gpu() -> torch.device:
    """Return the first GPU, where there are several ranks this one's.

    With its number: ``torch.cuda.set_device`` takes no other.
    """
    if size() == 1:
        return torch.device("cuda", 0)
    if local_rank() >= torch.cuda.device_count():
        raise DreamkitError(
            f"this machine has {torch.cuda.device_count()} GPUs: start no more processes on it "
            "(torchrun --nproc-per-node)",
            ("device",),
        )
    return torch.device("cuda", local_rank())


def default_backend(registries: Registries, device: torch.device) -> LatencyBackend:
    """Return the latency backend of a device; on MPS it is the CPU's."""
    name = "torch-cuda" if device.type == "cuda" else "torch-cpu"
    backend: LatencyBackend = registries["latency_backends"].resolve(name)()
    return backend
