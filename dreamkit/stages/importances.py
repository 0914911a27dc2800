"""The importances of a network's channels in a pruning run: by criteria, or as measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.errors import NothingToPrune
from dreamkit.flat_state import below, prefixed
from dreamkit.pruning.graph import Skipped
from dreamkit.pruning.selection import Limits
from dreamkit.seeds import stream
from dreamkit.stages.channel_pruning import ChannelPruning
from dreamkit.stages.ranking import Ranking
from dreamkit.stages.samples import fitting_sample
from dreamkit.stages.sensitivity import Measured
from dreamkit.training.batches import in_order
from dreamkit.types import ChannelGroup, Images, LatencyTable, PruningStep, RunContext, Teacher


class Importances:
    """What tells, round by round, how much each channel matters.

    Args:
        options: of the pruning.
        teacher: that is pruned.
        groups: its, before any pruning.
        table: predicts latencies.
        context: the run's.

    Attributes:
        limits: floors and chunk, which the ``sensitivity`` pass may narrow.
        multiple: of channels, that the target's kernels like.
        measured: what that pass found; None before it.
        originals: channels of each group before any pruning, by name.
        open: names of the groups that the limits do not leave alone from the start; these are
            ranked.
        images: what they are ranked on, once there are some.
    """

    images: Images

    def __init__(
        self,
        options: ChannelPruning,
        teacher: Teacher,
        groups: Sequence[ChannelGroup],
        table: LatencyTable,
        context: RunContext,
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.groups = groups
        self.table = table
        self.context = context
        self.measured: Measured | None = None
        self.originals = {group.name: group.channels for group in groups}
        self.limits: Limits = options.limits
        self.multiple = context.latency.channel_multiple
        self.open = self._left_open()
        self.ranking = Ranking(options.criteria, options.normalise)
        self.generator = stream(context.seed, "criteria")
        self._tell_multiple()

    def _tell_multiple(self) -> None:
        if self.multiple > 1 and self.options.limits.chunk == "auto":
            self.context.log.note(
                f"channels are kept in multiples of {self.multiple}, fewer in narrow layers, which "
                "the kernels of the latency backend like; limits.chunk sets another"
            )

    def follow(self, groups: Sequence[ChannelGroup]) -> None:
        """Take the groups of a network whose whole blocks have gone."""
        self.groups = groups
        known = self.originals
        self.originals = {g.name: known.get(g.name, g.channels) for g in groups}
        self.open = self._left_open()

    def _left_open(self) -> set[str]:
        return {group.name for group in self.groups if self.chunks(group)}

    def chunks(self, group: ChannelGroup) -> list[int]:
        """Return the sizes of the chunks of a group that may go, one after the other."""
        return self.limits.chunks(group, self.originals[group.name], self.multiple)

    def chunk_of(self, group: ChannelGroup) -> int:
        """Return how many channels of a group go together."""
        return self.limits.chunk_of(self.originals[group.name], self.multiple)

    def check_any(self, skipped: Sequence[Skipped]) -> None:
        """Refuse a network of which nothing may go.

        Args:
            skipped: its groups that cannot be pruned.

        Raises:
            NothingToPrune: it is one; the message says why, group by group.
        """
        if self.open:
            return
        blocked = list(skipped)
        for group in self.groups:
            chunk = self.chunk_of(group)
            why = f"{group.channels} channels leave no spare chunk of {chunk}"
            blocked.append(Skipped(group.name, why))
        listed = "".join(f"\n  {s.group}: {s.reason}" for s in blocked[:20])
        name = self.teacher.card.name
        raise NothingToPrune(f"nothing of {name} can be pruned:{listed}", ("limits",))

    def check(self, model: nn.Module) -> None:
        """Let criteria refuse what they cannot score."""
        self.ranking.check(model, [group for group in self.groups if group.name in self.open])

    def begin(self, images: Images) -> None:
        """Take the images that channels are ranked on."""
        count = self.options.batch_size * self.options.ranking_batches
        self.images = fitting_sample(images, count, self.context.seed, "ranking")

    def know(self, measured: Measured) -> None:
        """Take in what the ``sensitivity`` pass found."""
        self.measured = measured
        self.context.log.details["sensitivity"] = measured.to_json()
        sensitivity = self.options.sensitivity
        if sensitivity is not None and sensitivity.max_drop is not None:
            limits, drop = self.options.limits, sensitivity.max_drop
            self.limits = measured.narrowed(limits, drop, self.originals)
            self.open = self._left_open()

    def __call__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        """Return the importances (channels,) of the groups that are ranked, by name.

        Args:
            model: as it is.
            groups: of it.
        """
        ranked = [group for group in groups if group.name in self.open]
        # What is timed for them must be the same on every rank.
        found = distributed.broadcast(self._by_criteria(model, ranked))
        scores = {group.name: score for group, score in zip(ranked, found, strict=True)}
        if self.options.importance == "measured" and self.measured is not None:
            return self.measured.importances(scores, self.originals)
        return scores

    def _by_criteria(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
        passes = self.options.ranking_batches * len(self.options.criteria)
        with self.context.log.progress("ranking", passes) as advance:
            step = PruningStep(
                model=model,
                teacher=self.teacher.model,
                groups=groups,
                card=self.teacher.card,
                chunks=[self.chunks(group) for group in groups],
                device=self.context.device,
                batches=partial(self._batches, advance, itertools.count(1)),
                latency=self.table,
                generator=self.generator,
            )
            return self.ranking(step)

    def _batches(
        self, advance: Callable[[int], None], passed: Iterator[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        card, device = self.teacher.card, self.context.device
        all_batches = in_order(self.images, self.options.batch_size)
        for stored, labels in itertools.islice(all_batches, self.options.ranking_batches):
            yield card.normalise(stored.to(device)), labels.to(device)
            advance(next(passed))

    def state(self) -> dict[str, Tensor]:
        """Return what the next round needs to know, as a flat dictionary of tensors."""
        return {"generator": self.generator.get_state()} | prefixed("ranking", self.ranking.state())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.generator.set_state(state["generator"])
        self.ranking.restore(below("ranking", state))
