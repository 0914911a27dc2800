"""Which channels can only be removed together, and removing them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dreamkit.errors import NothingToPrune, PluginError
from dreamkit.pruning.channels import NONE, Trace, Use
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.tracing import trace
from dreamkit.types import ChannelGroup, ChannelRule, Member
from dreamkit.wording import one_line

_FIXED = "the model's code fixes how many there are"
_CUT = "the code cuts them at a fixed number"


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
        self._size = input_size
        self._rules = tuple(rules)
        try:
            found = trace(model, input_size, rules)
        except PluginError:
            raise
        except Exception as error:  # the model is anyone's code
            reason = one_line(error)
            raise NothingToPrune(f"the model's channels cannot be followed: {reason}") from error
        self._take(found)
        self._rule_out_fixed()

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

    def _rule_out_fixed(self) -> None:
        """Rule out groups without some of whose channels the model does not run, or runs askew."""
        self._rule_out(set(self._failing(self._suspects())), _FIXED)
        # Only now: where something fails in any case, no number shows that it is needless.
        self._drop_needless(self._suspects())
        held = {(use.name, use.axis) for use in self._uses}
        for labels, numbers in self._slices:
            if not held & set(numbers):
                self._rule_out({self._names[label] for label in labels if label != NONE}, _CUT)
        self._rule_out(set(self._failing(self._suspects())), _FIXED)

    def _suspects(self) -> list[str]:
        return [group.name for group in self.groups()[0] if group.channels > 1]

    def _rule_out(self, names: set[str], reason: str) -> None:
        for label, name in self._names.items():
            if name in names and self._reasons[label] is None:
                self._reasons[label] = reason

    def _drop_needless(self, suspects: list[str]) -> None:
        """Forget numbers of modules that happen to equal a number of channels.

        A number is one only if the model cannot do without its change.
        """
        numbers = [use for use in self._uses if use.axis.startswith("attribute:")]
        if not numbers:
            return
        needed = [use for use in self._uses if use not in numbers]
        for use in [None, *numbers]:
            others = [n for n in numbers if use is not None and n is not use]
            if self._runs_without(suspects, needed + others):
                self._uses = needed + others
                numbers = others
                if not numbers:
                    return

    def _failing(self, suspects: list[str]) -> list[str]:
        """Return those groups that cannot lose a channel, by halving."""
        if not suspects or self._runs_without(suspects, self._uses):
            return []
        if len(suspects) == 1:
            return suspects
        half = len(suspects) // 2
        return self._failing(suspects[:half]) + self._failing(suspects[half:])

    def _runs_without(self, names: list[str], uses: list[Use]) -> bool:
        """Whether every layer still reads what it should once some groups lost channels.

        Groups lose one or two in turn, and not the first ones alone: what is coupled without our
        knowing shows by numbers that differ.
        """
        trial = copy.copy(self)
        trial.model = copy.deepcopy(self.model)
        trial.pruning_record = PruningRecord()
        trial._uses = [replace(use) for use in uses]
        sizes = {group.name: group.channels for group in self.groups()[0]}
        removed = {}
        for number, name in enumerate(names):
            count = 1 + number % 2 if sizes[name] > 2 else 1
            removed[name] = [(number + i) % sizes[name] for i in range(count)]
        gone = trial._labels_of(removed)
        try:
            trial.remove(removed)
            found = trace(trial.model, self._size, self._rules)
        except Exception:  # whatever the model's code raises when its numbers do not fit
            return False
        cuts = [[label for label in cut if label not in gone] for cut in self._cuts]
        return _same_structure(trial._uses, cuts, found)


def _same_structure(expected: list[Use], cuts: list[list[int]], found: Trace) -> bool:
    """Whether the same channels meet in two traces, whatever their numbers."""
    pairs = []
    for use in expected:
        if use.axis.startswith("attribute"):
            continue  # whether a number is found again depends on what else equals it
        other = found.uses.get((use.name, use.axis))
        if other is None:
            return False
        pairs.append((use.labels, other.labels))
    if len(cuts) != len(found.cuts):
        return False
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for labels, others in [*pairs, *zip(cuts, found.cuts, strict=True)]:
        if len(labels) != len(others):
            return False
        for label, raw in zip(labels, others, strict=True):
            root = found.find(raw)
            if there.setdefault(label, root) != root or back.setdefault(root, label) != label:
                return False
    return True
