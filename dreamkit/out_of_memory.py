"""Memory that could not be had: how it is told, what to do about it, and how to do with less."""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dreamkit.allocator import give_back
from dreamkit.errors import OutOfMemory, RecipePath
from dreamkit.wording import first_line

_REFUSED = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to) allocate"
    r"|enforce fail at alloc_cpu|bad[_ ]alloc|ALLOC_FAILED|MemoryAllocation"
    # oneDNN's words where it finds none; what it does not support it calls a descriptor.
    r"|could not create a (memory object|primitive)(?! descriptor)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had.

    Torch has a class for that on CUDA alone. On a CPU it is a RuntimeError like any other, and so
    is what oneDNN, cuBLAS, cuDNN and MPS raise.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None


@contextmanager
def enough_memory(doing: str, cure: str, path: RecipePath = ()) -> Iterator[None]:
    """Say which option asks for less where memory runs out in the block.

    Args:
        doing: what the block does, e.g. ``training``.
        cure: what to do, e.g. ``lower batch_size``.
        path: the place of the option, if it is known.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error) or type(error).__name__
        # Not "from error": its frames hold what filled the memory.
        raise OutOfMemory(f"memory ran out while {doing}: {cure} ({reason})", path) from None


ASK_LESS = (
    "lower the batch_size of what it was at, use smaller images, or a device with more; what was "
    "finished is kept"
)
"""The cure where it is not known which option asked for so much."""


def give_back_memory() -> None:
    """Free what a failed attempt left, so that a smaller one finds room."""
    gc.collect()
    give_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class InParts:
    """Computes batches whole, or in parts where memory is short of the whole.

    For what does to an image the same whatever it is beside, such as a network in eval mode.

    Args:
        function: of images (N, ...), to a tensor (N, ...).
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.most: int | None = None
        """Images that fit, once it is known that not all do."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the function gives for images (N, ...), N at least 1."""
        while True:
            size = min(self.most or len(images), len(images))
            try:
                return torch.cat([self.function(part) for part in images.split(size)])
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            self.most = size // 2
            give_back_memory()
