"""Letting the channels that stay tell what those that go told, within a run of pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from dreamkit import distributed
from dreamkit.out_of_memory import enough_memory
from dreamkit.pruning.compensation import compensate
from dreamkit.pruning.readings import Readings, readings
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.statistics import Statistics
from dreamkit.types import ChannelGroup, RunContext


@dataclass(frozen=True)
class Compensation:
    """Weights of the channels that stay make up for those that go, as far as these follow them.

    The least squares of the Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1993), over the
    images that BatchNorm's statistics are taken of, in one pass of the network a round.

    Args:
        ridge: how far the weights are held to what they were, as a share of the variance of what
            they multiply; more where images are few.
    """

    ridge: Annotated[float, Field(gt=0)] = 1e-3


class Compensating:
    """What the layers of a network read, before some of its channels go.

    Args:
        options: how; None leaves weights as they are.
        statistics: which BatchNorm has after a removal.
        context: the run's.
    """

    def __init__(
        self, options: Compensation | None, statistics: Statistics, context: RunContext
    ) -> None:
        self.options = options
        self.centred = statistics != "keep"  # statistics taken anew make up for means that shift
        self.context = context
        self.seen: Readings = {}
        self.groups: Sequence[ChannelGroup] = ()

    def look(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: NormalisedBatches
    ) -> None:
        """See what the layers read, of a network as it is."""
        if self.options is None:
            return
        cure = f"lower batch_size ({batches.batch_size} now)"
        with (
            self.context.log.progress("what layers read", len(batches)) as advance,
            enough_memory("seeing what layers read", cure, ("batch_size",)),
        ):
            self.seen, self.groups = readings(model, groups, batches, advance), groups

    def make_up(
        self, model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]]
    ) -> None:
        """Change the weights of a network that was looked at, just before channels go."""
        if self.options is not None:
            ridge = self.options.ridge
            self.seen = compensate(model, groups, removed, self.seen, ridge, self.centred)
            _agree(model, self.seen, self.context.device)

    def try_on(self, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> None:
        """Do so to a copy of the network that was looked at, on this rank alone."""
        if self.options is not None:
            compensate(model, self.groups, removed, self.seen, self.options.ridge, self.centred)


def _agree(model: nn.Module, seen: Readings, device: torch.device) -> None:
    """Give every rank the first one's weights: sums may differ in the last bit."""
    if distributed.size() == 1:
        return
    names = distributed.broadcast(list(seen))
    own = {
        f"{name}.{key}": parameter
        for name in names
        for key, parameter in model.get_submodule(name)._parameters.items()
        if parameter is not None
    }
    if own:
        for name, tensor in distributed.broadcast_tensors(own, device).items():
            own[name].data.copy_(tensor)
