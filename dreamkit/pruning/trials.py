"""Runs of a network without some channels: does it run, and if not, which are to blame?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from dreamkit.pruning.channels import NONE, Trace, TraceFailed, Use
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.tracing import trace
from dreamkit.types import ChannelRule

Blame = list[set[int]]
"""Channels that a failed run may have failed for, those nearest to the failure first."""


class Trials:
    """Runs of a network, each without some channels, which it has again afterwards.

    Args:
        model: as it is.
        input_size: (channels, height, width).
        rules: what becomes of channels beside what is known.
        whole: the trace of the network as it is.
        cuts: the channels before each cut of that trace, by what stands for them.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        rules: Sequence[ChannelRule],
        whole: Trace,
        cuts: Sequence[Sequence[int]],
    ) -> None:
        self.model = model
        self._size = input_size
        self._rules = tuple(rules)
        self._training_size = whole.training_size
        self._cuts = cuts

    def blame(self, uses: Sequence[Use], gone: set[int]) -> Blame | None:
        """Run without some channels; return what may be to blame if it fails, None if it does not.

        Args:
            uses: the axes of all layers that have channels.
            gone: the channels.
        """
        expected = [
            replace(use, labels=[label for label in use.labels if label not in gone])
            for use in uses
        ]
        cuts = [[label for label in cut if label not in gone] for cut in self._cuts]
        try:
            with _without(self.model, uses, gone):
                found = trace(self.model, self._size, self._rules, self._training_size)
        except TraceFailed as failed:
            return _blamed_of(failed, uses, expected)
        except Exception:  # what is cut, and the rules of plugins, are anyone's code
            return []
        return _disagreement(uses, expected, cuts, found)


@contextmanager
def _without(model: nn.Module, uses: Sequence[Use], gone: set[int]) -> Iterator[None]:
    """Take channels from a model for as long as the block lasts; no weight is copied."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for use in uses:
            kept = [i for i, label in enumerate(use.labels) if label not in gone]
            if len(kept) < len(use.labels):
                for name in use.tensors:
                    path, _, key = name.rpartition(".")
                    owner = model.get_submodule(path)
                    before.append((owner, key, getattr(owner, key)))
                for size in use.sizes:
                    module = model.get_submodule(use.name)
                    before.append((module, size, getattr(module, size)))
                PruningRecord().cut(model, use, kept)
        yield
    finally:
        for owner, key, value in reversed(before):
            setattr(owner, key, value)


def _blamed_of(failed: TraceFailed, uses: Sequence[Use], expected: Sequence[Use]) -> Blame:
    """Return what may be to blame for an exception: what the call was given, then its caller..."""
    known: dict[int, int] = {}
    for use in expected:
        there = failed.trace.uses.get((use.name, use.axis))
        if there is not None and len(there.labels) == len(use.labels):
            roots = map(failed.trace.find, there.labels)
            known.update(zip(roots, use.labels, strict=True))
    found: Blame = []
    for place in failed.places:
        given = {known.get(failed.trace.find(label), NONE) for label in place.labels}
        if place.module is not None:
            below = f"{place.module}." if place.module else ""
            for use in uses:
                if use.name == place.module or use.name.startswith(below):
                    given.update(use.labels)
        found.append(given)
    return found


def _disagreement(
    uses: Sequence[Use], expected: Sequence[Use], cuts: Sequence[Sequence[int]], found: Trace
) -> Blame | None:
    """Return what is to blame where other channels meet than do in the whole; None if none do."""
    pairs: list[tuple[Iterable[int], Sequence[int], Sequence[int] | None]] = []
    for whole, use in zip(uses, expected, strict=True):
        if use.axis.startswith("attribute"):
            continue  # whether a number is found again depends on what else equals it
        other = found.uses.get((use.name, use.axis))
        pairs.append((whole.labels, use.labels, None if other is None else other.labels))
    every = {label for cut in cuts for label in cut}
    if len(cuts) != len(found.cuts):
        return [every]
    pairs += [(cut, cut, other) for cut, other in zip(cuts, found.cuts, strict=True)]
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for whole_labels, labels, others in pairs:
        if others is None or len(labels) != len(others):
            return [set(whole_labels), every]
        for label, raw in zip(labels, others, strict=True):
            root = found.find(raw)
            if there.setdefault(label, root) != root or back.setdefault(root, label) != label:
                met = back.get(root, NONE)
                return [{label, met}, {*whole_labels, met}, every]
    return None
