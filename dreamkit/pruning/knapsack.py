"""HALP's choice of what goes: the least importance for what must be saved, as a knapsack.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022. Of each group chunks
go in the order of their importance; what a chunk saves is told from the layers' shapes with all
other groups as they are, which holds for steps that are small. The problem is solved exactly, as a
mixed-integer program (SciPy's HiGHS), where a minute is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from dreamkit import distributed
from dreamkit.errors import DreamkitError
from dreamkit.pruning.selection import from_zero, savings
from dreamkit.types import Chunk, Saved, Selection, SelectionStep

_SECONDS = 60.0
"""Time for one problem; what counts is its best solution by then."""
_GAP = 1e-4
"""Shares of the optimum that are not worth a search."""
_OUT_OF_TIME, _INFEASIBLE = 1, 2
"""What SciPy calls these ends of a search."""


@dataclass(frozen=True)
class Knapsack(Selection):
    """The least importance that saves what a round has to, as a knapsack, solved exactly.

    HALP: Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022.
    """

    def __call__(self, step: SelectionStep) -> dict[str, list[int]]:
        """Return the channels to remove of each group, by name.

        Raises:
            DreamkitError: time ran out before there was any choice.
        """
        return choose_knapsack(step.chunks, step.shortfall(), step.note) or {}


def choose_knapsack(
    chunks: Sequence[Sequence[Chunk]],
    needs: Sequence[tuple[Saved, float]],
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, list[int]] | None:
    """Choose the chunks whose importances sum to the least, among those that save enough.

    Args:
        chunks: of each group, in the order in which they may go.
        needs: what channels save of something, and how much of it, above 0, must be saved.
        note: told where time ran out and the choice may not be the best.

    Returns:
        The channels to remove of each group, by name; None where the chunks cannot save as much.

    Raises:
        DreamkitError: time ran out before there was any choice.
    """
    items = [chunk for group in chunks for chunk in group]
    if not items:
        return None
    taken = _solution(_problem(chunks, items, needs), len(items), note)
    if taken is None:
        return None
    chosen: dict[str, list[int]] = {}
    for chunk, share in zip(items, taken, strict=True):
        if share > 0.5:
            chosen.setdefault(chunk.group.name, []).extend(chunk.channels)
    return chosen


def _solution(
    problem: dict[str, Any], size: int, note: Callable[[str], None]
) -> Sequence[float] | None:
    """Return the best solution there is in the time, one number an item; None if none exists."""
    # How far a search gets depends on the machine, and every rank must choose the same.
    solved: Any = distributed.broadcast(milp(**problem) if distributed.is_first() else None)
    if solved.status == _INFEASIBLE:
        return None
    within = f" in {_SECONDS:.0f} s" if solved.status == _OUT_OF_TIME else ""
    if solved.x is None:
        raise DreamkitError(
            f"the knapsack of {size} chunks was not solved{within} (HiGHS: {solved.message}); make "
            "them fewer by a larger limits.chunk, or choose by 'selection: greedy'"
        )
    if within:
        note(
            f"the knapsack of {size} chunks was not solved to the end{within}: importance up to "
            f"{solved.mip_gap:.1%} less might have saved as much"
        )
    found: Sequence[float] = solved.x
    return found


def _problem(
    chunks: Sequence[Sequence[Chunk]],
    items: Sequence[Chunk],
    needs: Sequence[tuple[Saved, float]],
) -> dict[str, Any]:
    """Return the mixed-integer program over all chunks, as SciPy takes it."""
    # Importances below 0 would all be taken, however little has to be saved.
    scores = np.concatenate(from_zero(chunks))
    saved = [np.concatenate(savings(chunks, saved)) / need for saved, need in needs]
    rows = [LinearConstraint(row[None], 1.0) for row in saved]
    pairs = _neighbours(chunks)
    if pairs:
        # +1 for the earlier chunk of a pair, -1 for the later: it goes only if the earlier does.
        row = np.repeat(np.arange(len(pairs)), 2)
        value = np.tile([1.0, -1.0], len(pairs))
        order = csr_array((value, (row, np.ravel(pairs))), shape=(len(pairs), len(items)))
        rows.append(LinearConstraint(order, 0.0))
    return {
        "c": scores / (scores.max() or 1.0),
        "integrality": np.ones(len(items)),
        "bounds": (0, 1),
        "constraints": rows,
        "options": {"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    }


def _neighbours(chunks: Sequence[Sequence[Chunk]]) -> list[tuple[int, int]]:
    """Return the places of every chunk and of the one that may go after it."""
    pairs, first = [], 0
    for group in chunks:
        pairs += [(first + k, first + k + 1) for k in range(len(group) - 1)]
        first += len(group)
    return pairs
