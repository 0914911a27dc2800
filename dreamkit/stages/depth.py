"""Whole residual blocks go before channels do, as long as that does less harm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from dreamkit import distributed
from dreamkit.copying import copied
from dreamkit.errors import NothingToPrune, TeacherMismatch
from dreamkit.model_state import device_of, eval_mode
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.pruning.blocks import bypassed
from dreamkit.pruning.record import PruningRecord
from dreamkit.stages.budget import Budget
from dreamkit.stages.comparing import Comparing
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import RunContext, Teacher

Settle = Callable[[nn.Module, PruningRecord], None]
"""Gives BatchNorm of a network that lacks what a record says the statistics it is to have."""
Shares = Mapping[str, float]


@dataclass(frozen=True)
class Depth:
    """Whole residual blocks go first, each as long as channels that save as much do more harm.

    Networks with residual sums "behave like ensembles of relatively shallow networks" (Veit et al.,
    NeurIPS 2016), those trained with stochastic depth most of all. The block that does the least
    harm for what it saves is tried beside the channels that would be removed for as much; harm is
    mean KL(p_T ‖ p) of the outputs. With ``target.channels`` there are no such blocks: a block is
    not a number of channels.

    Args:
        margin: how many times the harm of such channels a block may do. On dreams channels look
            better than they are: the weights that make up for them are fitted to dreams.
        images: that harm is measured on, of those that are held back; BatchNorm's statistics are
            taken over about as many.
    """

    margin: Annotated[float, Field(gt=0)] = 1.5
    images: Annotated[int, Field(ge=2)] = 64


@dataclass(frozen=True)
class Removal:
    """A block that may go.

    Args:
        block: its name.
        shares: what is left of the goals' costs without it.
        saved: what that brings the target nearer, a share of the way.
        agreement: with the teacher, without it.
        divergence: from the teacher, without it; mean KL(p_T ‖ p) in nats.
    """

    block: str
    shares: Shares
    saved: float
    agreement: float
    divergence: float

    @property
    def price(self) -> float:
        """Harm for what is saved."""
        return self.divergence / self.saved


class BlockRemoval:
    """Chooses blocks, one after the other.

    Args:
        margin: of ``Depth``.
        blocks: names of those that may go.
        teacher: that is pruned; its card has the size of the student's images.
        budget: the goals.
        comparing: the teacher's outputs on images.
        settle: done to each network that lacks something before it is looked at.
        by_channels: returns the network without the channels that would go to reach some shares,
            and what it lacks; raises ``NothingToPrune`` where they cannot.
        context: the run's.
    """

    def __init__(
        self,
        margin: float,
        blocks: Sequence[str],
        teacher: Teacher,
        budget: Budget,
        comparing: Comparing,
        settle: Settle,
        by_channels: Callable[[Shares], tuple[nn.Module, PruningRecord]],
        context: RunContext,
    ) -> None:
        self.margin = margin
        self.blocks = list(blocks)
        self.teacher = teacher
        self.budget = budget
        self.comparing = comparing
        self.settle = settle
        self.by_channels = by_channels
        self.context = context
        self.prices: dict[str, float] = {}
        """What each block cost when it was last tried: without others it costs no less."""

    def __call__(self, student: nn.Module, shares: Shares) -> Removal | None:
        """Return the block that goes next, the same on every rank; None if channels do better.

        Args:
            student: as it is; unchanged.
            shares: what it costs.
        """
        if self.budget.met(shares) or not self.blocks:
            return None
        best = self._best(student, shares)
        if best is None:
            return None
        harm = self._harm_by_channels(best.shares)
        goes = distributed.broadcast(best.divergence <= self.margin * harm)
        self._tell(best, harm, goes)
        if not goes:
            return None
        self.blocks.remove(best.block)
        return best

    def _best(self, student: nn.Module, shares: Shares) -> Removal | None:
        """Return the block that does the least harm for what it saves.

        Blocks are tried in the order of what they cost last. A block whose last price is higher
        than the best one found now is not tried again.
        """
        names = sorted(self.blocks, key=lambda name: self.prices.get(name, 0.0))
        best: Removal | None = None
        with self.context.log.progress("blocks", len(names)) as advance:
            for number, name in enumerate(names, 1):
                if best is not None and self.prices.get(name, 0.0) >= best.price:
                    break
                found = distributed.broadcast(self._tried(student, name, shares))
                self.prices[name] = math.inf if found is None else found.price
                if found is not None and (best is None or found.price < best.price):
                    best = found
                advance(number)
                self.context.log.check(together=True)
        return best

    def _tried(self, student: nn.Module, name: str, shares: Shares) -> Removal | None:
        """Return what removing a block does; None if it does not help, or leads too far."""
        with bypassed(student, name):
            try:
                check_outputs(Teacher(student, self.teacher.card, {}))
            except TeacherMismatch:
                return None  # the network's code asks something of the block
            if not _learns(student, self.teacher.card.input_size):
                return None
            left = self.budget.shares(student, 1)
            saved = self.budget.progress(left) - self.budget.progress(shares)
            if saved <= 0 or self.budget.overshot(left):
                return None
            smaller = copied(student)
        self.settle(smaller, PruningRecord())
        return Removal(name, left, saved, *self.comparing(smaller))

    def _harm_by_channels(self, shares: Shares) -> float:
        try:
            smaller, record = self.by_channels(shares)
        except NothingToPrune:
            return math.inf
        self.settle(smaller, record)
        return self.comparing(smaller)[1]

    def _tell(self, removal: Removal, harm: float, goes: bool) -> None:
        told: list[dict[str, Any]] = self.context.log.details.setdefault("depth", [])
        told.append(
            {
                "block": removal.block,
                "shares": {name: removal.shares[name] for name in self.budget.goals},
                "agreement": removal.agreement,
                "divergence": removal.divergence,
                "divergence_by_channels": harm if math.isfinite(harm) else None,
                "gone": goes,
            }
        )
        if goes:
            self.context.log.note(f"block {removal.block} goes whole: less harm than by channels")


def _learns(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Whether weights get gradients: what works in place on a sum may not on what led to it."""
    images = torch.zeros(2, *input_size, device=device_of(model))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        with eval_mode(model), torch.enable_grad():
            torch.autograd.grad(model(images).sum(), weights, allow_unused=True)
    except RuntimeError as error:  # the model may be anyone's code
        if is_out_of_memory(error):
            raise
        return False
    return True
