"""Which channels can only be removed together, and removing them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dreamkit.copying import copied
from dreamkit.errors import NothingToPrune
from dreamkit.pruning.channels import NONE, Trace, TraceFailed, Use
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.tracing import trace
from dreamkit.pruning.trials import Trials
from dreamkit.types import ChannelGroup, ChannelRule, Member
from dreamkit.wording import one_line

_FIXED = "the model's code fixes how many there are"
_CUT = "the code cuts them at a fixed number"

BeforeRemoval = Callable[[nn.Module, Mapping[str, Sequence[int]]], None]
"""Done to a network some of whose channels, by group, are about to go."""


@dataclass(frozen=True)
class Skipped:
    """A channel group that cannot be pruned, and why."""

    group: str
    reason: str


class ChannelGraph:
    """The channel groups of a model, kept true while channels are removed.

    Args:
        model: as it now is; run a few times, here.
        input_size: (channels, height, width).
        pruning_record: record of what was cut before, which is gone on with.
        rules: what becomes of channels in layers and operations beside PyTorch's own.

    Raises:
        NothingToPrune: the model does not run.
        PluginError: a rule fails.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        pruning_record: PruningRecord | None = None,
        rules: Sequence[ChannelRule] = (),
    ) -> None:
        self.model = model
        self.pruning_record = PruningRecord() if pruning_record is None else pruning_record
        try:
            found = trace(model, input_size, rules)
        except TraceFailed as error:
            reason = one_line(error.__cause__ or error)
            raise NothingToPrune(f"the model's channels cannot be followed: {reason}") from error
        self._take(found)
        self._rule_out_fixed(Trials(model, input_size, rules, found, self._cuts))

    def _take(self, found: Trace) -> None:
        """Sort channels into groups: those that the same layers have."""
        self._uses = [
            replace(use, labels=[found.find(label) for label in use.labels])
            for use in found.uses.values()
        ]
        self._slices = [
            ([found.find(label) for label in labels], numbers) for labels, numbers in found.slices
        ]
        self._cuts = [[found.find(label) for label in cut] for cut in found.cuts]
        self._reasons = {
            label: found.reason(label)
            for use in self._uses
            for label in use.labels
            if label != NONE
        }
        self._names = self._named()

    def _named(self) -> dict[int, str]:
        """Return the group of each channel, named for the first layer that makes it."""
        places: dict[int, list[tuple[str, str]]] = {}
        for use in self._uses:
            for label in use.labels:
                if label != NONE:
                    places.setdefault(label, []).append((use.name, use.axis))
        names: dict[tuple[object, ...], str] = {}
        given: dict[str, int] = {}
        found = {}
        for label, layers in places.items():
            signature = (self._reasons[label], *layers)
            if signature not in names:
                makers = [name for name, axis in layers if axis == "out"]
                name = (makers or [layers[0][0]])[0]
                given[name] = given.get(name, 0) + 1
                names[signature] = name if given[name] == 1 else f"{name}#{given[name]}"
            found[label] = names[signature]
        return found

    @property
    def makers(self) -> list[str]:
        """The layers that make channels, whether these can be pruned or not, in forward order."""
        return list(dict.fromkeys(use.name for use in self._uses if use.axis == "out"))

    def groups(self) -> tuple[list[ChannelGroup], list[Skipped]]:
        """Return the groups that can be pruned, and those that cannot."""
        channels: dict[str, dict[int, int]] = {}
        for use in self._uses:
            for label in use.labels:
                if label != NONE:
                    numbers = channels.setdefault(self._names[label], {})
                    numbers.setdefault(label, len(numbers))
        members: dict[str, list[Member]] = {name: [] for name in channels}
        for use in self._uses:
            for name in dict.fromkeys(self._names[x] for x in use.labels if x != NONE):
                index = [i for i, label in enumerate(use.labels) if label in channels[name]]
                channel = [channels[name][use.labels[i]] for i in index]
                member = Member(use.name, use.axis, torch.tensor(index), torch.tensor(channel))
                members[name].append(member)
        found, skipped = [], []
        for name, numbers in channels.items():
            reason = self._reasons[next(iter(numbers))]
            if reason is not None:
                skipped.append(Skipped(name, reason))
            elif any(member.axis == "out" for member in members[name]):
                found.append(ChannelGroup(name, len(numbers), tuple(members[name])))
            else:
                skipped.append(Skipped(name, "no layer makes them"))
        return found, skipped

    def remove(self, removed: Mapping[str, Sequence[int]]) -> None:
        """Remove channels of some groups, by name, from every layer that has them.

        The numbers are those of ``groups``, all of them as they are before.
        """
        gone = self._labels_of(removed)
        for use in self._uses:
            kept = [i for i, label in enumerate(use.labels) if label not in gone]
            if len(kept) < len(use.labels):
                self.pruning_record.cut(self.model, use, kept)
                use.labels = [use.labels[i] for i in kept]

    def without(
        self,
        removed: Mapping[str, Sequence[int]],
        before: BeforeRemoval = lambda model, removed: None,
    ) -> tuple[nn.Module, PruningRecord]:
        """Return a copy of the model without some channels, and what it lacks; all else stays.

        Args:
            removed: as ``remove`` takes it.
            before: done to the copy while it has all its channels.
        """
        twin = copy.copy(self)
        twin.model, twin.pruning_record = copied(self.model), PruningRecord()
        before(twin.model, removed)
        twin._uses = [replace(use) for use in self._uses]  # a cut gives a use new labels
        twin.remove(removed)
        return twin.model, twin.pruning_record

    def _labels_of(self, removed: Mapping[str, Sequence[int]]) -> set[int]:
        numbers: dict[str, list[int]] = {}
        seen = set()
        for use in self._uses:
            for label in use.labels:
                if label != NONE and label not in seen:
                    seen.add(label)
                    numbers.setdefault(self._names[label], []).append(label)
        return {
            numbers[name][channel] for name, channels in removed.items() for channel in channels
        }

    # --- what code fixes ----------------------------------------------------------------------

    def _rule_out_fixed(self, trials: Trials) -> None:
        """Rule out groups without some of whose channels the model does not run, or runs askew."""
        self._rule_out_failing(trials)
        # Only now: where something fails in any case, no number shows that it is needless.
        before = self._uses
        self._drop_needless(trials)
        held = {(use.name, use.axis) for use in self._uses}
        cut = [
            self._names[label]
            for labels, numbers in self._slices
            if not held & set(numbers)
            for label in labels
            if label != NONE
        ]
        self._rule_out(cut, _CUT)
        if cut or self._uses is not before:
            self._rule_out_failing(trials)

    def _suspects(self) -> dict[str, list[int]]:
        """Return the groups that may lose channels, and the channels of each."""
        channels: dict[str, dict[int, None]] = {}
        made = {label for use in self._uses if use.axis == "out" for label in use.labels}
        for use in self._uses:
            for label in use.labels:
                if label in made and label != NONE and self._reasons[label] is None:
                    channels.setdefault(self._names[label], {})[label] = None
        return {name: list(labels) for name, labels in channels.items() if len(labels) > 1}

    def _rule_out(self, names: Iterable[str], reason: str) -> None:
        names = set(names)
        for label, name in self._names.items():
            if name in names and self._reasons[label] is None:
                self._reasons[label] = reason

    def _drop_needless(self, trials: Trials) -> None:
        """Forget numbers of modules that happen to equal a number of channels.

        A number is one only if the model cannot do without its change. Modules of one class run
        the same code, so their numbers of one name are tried together.
        """
        numbers: dict[tuple[type, str], list[Use]] = {}
        for use in self._uses:
            if use.axis.startswith("attribute:"):
                kind = type(self.model.get_submodule(use.name)), use.axis
                numbers.setdefault(kind, []).append(use)
        gone = _some_of(self._suspects())
        every = [use for uses in numbers.values() for use in uses]
        for dropped in [every, *numbers.values()]:
            others = [use for use in self._uses if use not in dropped]
            if len(others) < len(self._uses) and trials.blame(others, gone) is None:
                self._uses = others

    def _rule_out_failing(self, trials: Trials) -> None:
        """Rule out groups that cannot lose a channel: those to blame for a failed run, in turn."""
        suspects = self._suspects()
        while suspects:
            blame = trials.blame(self._uses, _some_of(suspects))
            if blame is None:
                return
            guilty: dict[str, list[int]] = {}
            likely: dict[str, list[int]] = {}
            for labels in blame:
                named = {self._names.get(label) for label in labels}
                near = {name: suspects[name] for name in suspects if name in named}
                if near and near != likely and near != suspects:
                    guilty = self._failing(near, trials)
                    likely = likely or near
                if guilty:
                    break
            # Where none fails alone, some fail together; those nearest to the failure then.
            guilty = guilty or self._halved(suspects, trials) or likely or suspects
            self._rule_out(guilty, _FIXED)
            suspects = {name: suspects[name] for name in suspects if name not in guilty}

    def _failing(self, suspects: dict[str, list[int]], trials: Trials) -> dict[str, list[int]]:
        """Return those groups that cannot lose a channel, by halving."""
        if not suspects or trials.blame(self._uses, _some_of(suspects)) is None:
            return {}
        return suspects if len(suspects) == 1 else self._halved(suspects, trials)

    def _halved(self, suspects: dict[str, list[int]], trials: Trials) -> dict[str, list[int]]:
        names = list(suspects)
        half = len(names) // 2
        parts = ({n: suspects[n] for n in part} for part in (names[:half], names[half:]))
        found: dict[str, list[int]] = {}
        for part in parts:
            found |= self._failing(part, trials)
        return found


def _some_of(groups: Mapping[str, Sequence[int]]) -> set[int]:
    """Return the channels that groups lose for trial.

    One or two in turn, and not the first ones alone: what is coupled without our knowing shows by
    numbers that differ.
    """
    gone: set[int] = set()
    for number, labels in enumerate(groups.values()):
        count = 1 + number % 2 if len(labels) > 2 else 1
        gone.update(labels[(number + i) % len(labels)] for i in range(count))
    return gone
