"""N:M sparsity: of every M weights that follow one another along the inputs, N stay.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021;
2:4 is what NVIDIA's sparse tensor cores multiply at twice the rate (Mishra et al., arXiv
2104.08378). The M weights are of neighbouring input channels, at one place of the kernel, for one
output channel, as NVIDIA's TensorRT checks them (its documentation, "Structured Sparsity") and its
tool for training them, ASP, lays them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dreamkit.errors import NothingToPrune
from dreamkit.pruning.unstructured import left_alone, weighted
from dreamkit.wording import and_more

_WRITTEN = re.compile(r"([0-9]{1,6}):([0-9]{1,6})", re.ASCII)


@dataclass(frozen=True)
class Pattern:
    """How many of how many weights stay.

    Args:
        kept: N, at least 1.
        of: M, greater than N.
    """

    kept: int
    of: int

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read ``N:M``.

        Raises:
            ValueError: it is not that, or N is not in 1 to M - 1.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"should be N:M, of every M weights N stay, such as 2:4, not '{text}'")
        kept, of = map(int, found.groups())
        if not 0 < kept < of:
            raise ValueError(
                f"'{text}' would keep {kept} of every {of} weights: N:M needs N from 1 to M - 1, "
                "such as 2:4"
            )
        return Pattern(kept, of)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    def on_the_way(self, rounds: int) -> list[Pattern]:
        """Return the patterns after each of some rounds, in which about as many weights go.

        Args:
            rounds: at most M - N, so that some go in each.
        """
        gone = self.of - self.kept
        return [Pattern(self.of - gone * n // rounds, self.of) for n in range(1, rounds + 1)]


def choose_in_groups(model: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """Return which weights stay where the N largest of every M do.

    Args:
        model: whose weights; not changed.
        pattern: N:M.

    Returns:
        By parameter name, 1 for what stays and 0 for what goes: exactly N of every M. Layers of
        ``left_whole`` are not there.

    Raises:
        NothingToPrune: no layer can have the pattern.
    """
    left = left_whole(model, pattern)
    chosen = {
        f"{name}.weight" if name else "weight": _largest(layer.get_parameter("weight"), pattern)
        for name, layer in weighted(model).items()
        if name not in left
    }
    if not chosen:
        reasons = "; ".join(f"{names}: {reason}" for reason, names in by_reason(left).items())
        raise NothingToPrune(
            f"no layer can have {pattern}: "
            + (reasons or "the network has no convolution and no linear layer"),
            ("pattern",),
        )
    return chosen


def left_whole(model: nn.Module, pattern: Pattern) -> dict[str, str]:
    """Return the layers that cannot have a pattern, by name, with the reason."""
    found = left_alone(model)
    for name, layer in weighted(model).items():
        reason = _reason(layer, pattern)
        if reason is not None:
            found[name] = reason
    return found


def _reason(layer: nn.Module, pattern: Pattern) -> str | None:
    if getattr(layer, "transposed", False):
        return "the pattern is not defined for transposed convolutions"
    inputs, groups = layer.get_parameter("weight").shape[1], getattr(layer, "groups", 1)
    if inputs % pattern.of == 0:
        return None
    counted = f"{inputs} in each group" if groups > 1 else f"{inputs}"
    return f"inputs ({counted}) are no multiple of {pattern.of}"


def by_reason(left: Mapping[str, str]) -> dict[str, str]:
    """Return the names of layers that are left alone, as text, by the reason that they share."""
    return {
        reason: and_more([name for name, other in left.items() if other == reason])
        for reason in dict.fromkeys(left.values())
    }


def _grouped(weight: Tensor, of: int) -> Tensor:
    """Return weights (out, in, ...) as (out, ..., in / M, M)."""
    last = weight.detach().movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, of)


def _largest(weight: Tensor, pattern: Pattern) -> Tensor:
    # Stable, so that of equal weights the first stay, on every machine.
    sizes = _grouped(weight, pattern.of).abs()
    order = sizes.argsort(dim=-1, descending=True, stable=True)
    stays: Tensor = order.argsort(dim=-1) < pattern.kept
    return stays.flatten(-2).movedim(-1, 1).to(weight.dtype).contiguous()


def has_pattern(weight: Tensor, pattern: Pattern) -> bool:
    """Return whether of every M weights (out, in, ...) along the inputs at most N are not zero."""
    if weight.dim() < 2 or weight.shape[1] == 0 or weight.shape[1] % pattern.of:
        return False
    there = (_grouped(weight, pattern.of) != 0).sum(-1)
    return there.numel() > 0 and int(there.max()) <= pattern.kept


def checked_patterns(record: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a pruning record without the patterns that weights do not have.

    Whatever trains, grows or cuts a network with a pattern may end it. So a record is held against
    the weights wherever one is written or read.

    Args:
        record: as ``PruningRecord`` writes it.
        state: the weights, by parameter name.
    """
    said = record.get("patterns")
    if not isinstance(said, Mapping):
        return dict(record)  # a file may claim anything; who rebuilds the network refuses it
    held = {name: text for name, text in said.items() if _is_held(state.get(name), text)}
    return {**record, "patterns": held}


def _is_held(weight: Tensor | None, text: Any) -> bool:
    try:
        return weight is not None and has_pattern(weight, Pattern.parse(text))
    except (TypeError, ValueError):
        return False
