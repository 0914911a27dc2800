"""Ranks: what a process is among those that torchrun started, and how they agree.

Without torchrun there is one rank, and all of this does nothing. Ranks run the same code in step;
what depends on the moment (timings, choices, signals) is decided by the first and told to the rest,
and the first alone writes files, but for dreams.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long a rank waits for the others: one may measure or dream while the rest do nothing."""


@contextmanager
def ranks() -> Iterator[None]:
    """Join the ranks that torchrun started, for as long as the block lasts."""
    if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun's store outlives ranks that it starts anew (--max-restarts): their addresses, and how
    # far they were in a queue, are not to be taken for those of the new ones.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"attempt {attempt}", store)
    distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        # DistributedDataParallel keeps the group in cycles, and one that is still there when the
        # interpreter ends aborts it.
        gc.collect()
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return this process's number, from 0."""
    return distributed.get_rank() if _joined() else 0


def size() -> int:
    """Return how many ranks there are."""
    return distributed.get_world_size() if _joined() else 1


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks to the user."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _joined() else 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if size() > 1:
        gather(None)


def broadcast(value: T) -> T:
    """Return the first rank's value on every rank; tensors in it are on the CPU."""
    if size() == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    found: T = held[0]
    return found


def broadcast_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the first rank's tensors on every rank.

    Args:
        tensors: on any device; what ranks but the first give is not looked at.
        device: of this rank, where they are returned.
    """
    # A pickled tensor comes back on the device that it was sent from, which is another rank's.
    sent = broadcast({name: tensor.cpu() for name, tensor in tensors.items()})
    return {name: tensor.to(device) for name, tensor in sent.items()}


def gather(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks."""
    if size() == 1:
        return [value]
    held: list[Any] = [None] * size()
    distributed.all_gather_object(held, value)
    return held


def anywhere(here: bool) -> bool:
    """Whether something holds on any rank."""
    if size() == 1:
        return here
    flag = torch.tensor(int(here))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first rank do a block before the rest, e.g. download what they then find there."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        if is_first():
            barrier()


def drawn_from(items: Sequence[T], name: str) -> Iterator[T]:
    """Yield the items that fall to this rank: each rank takes the next when it is done with one.

    Args:
        items: the same on every rank.
        name: of this queue, the same on every rank and used once.
    """
    if size() == 1:
        yield from items
        return
    # The store by which ranks found one another counts for all of them.
    store = distributed.distributed_c10d._get_default_store()
    while (number := store.add(f"dreamkit/{name}", 1) - 1) < len(items):
        yield items[number]
