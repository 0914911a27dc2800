"""The names of a state dict against those of a network: prefixes, counters, and what is amiss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

_SHOWN = 4
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Of DataParallel and its kin, torch.compile, and wrappers of whole networks or of parts."""
_COUNTERS = frozenset({"total_ops", "total_params", "n_averaged"})
"""Of thop, which leaves them in every layer, and of torch's AveragedModel."""


@dataclass(frozen=True)
class Reading:
    """A state dict by one reading of its names.

    Args:
        state: by name.
        said: what was done to the names, in sentences.
    """

    state: Mapping[str, Any]
    said: tuple[str, ...] = ()

    def missing(self, own: Mapping[str, Any]) -> list[str]:
        """Return the names that a network has and the state dict lacks."""
        # BatchNorm's step counter is absent from old checkpoints and means nothing in eval mode.
        return [k for k in own if k not in self.state and not k.endswith("num_batches_tracked")]

    def unexpected(self, own: Mapping[str, Any]) -> list[str]:
        """Return the names that a network does not have."""
        return [k for k in self.state if k not in own]

    def unlike(self, own: Mapping[str, Any]) -> list[str]:
        """Return the names whose tensor is none, or none that the network's can be filled from."""
        return [k for k, value in self.state.items() if k in own and not _like(value, own[k])]

    def misfits(self, own: Mapping[str, Any]) -> int:
        """Return how many names do not fit a network's state dict."""
        return len(self.missing(own)) + len(self.unexpected(own)) + len(self.unlike(own))


def _like(value: Any, own: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(own, Tensor) or value.is_quantized:
        return False
    # A lazy layer takes its shapes from what it is given.
    return bool(is_lazy(own)) or value.shape == own.shape


def readings(state: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> list[Reading]:
    """Return the ways in which a state dict's names can be meant, the plainest first.

    Args:
        state: by the names of the file.
        own: of the network.
        prefix: removed from the front of the names.
    """
    plain, said = _without_counters(state, own)
    found: list[Reading] = []

    def add(names: dict[str, str], *more: str) -> None:
        """Keep a reading that gives every name once."""
        if len(set(names.values())) == len(names):
            renamed = {new: plain[old] for old, new in names.items()}
            found.append(Reading(renamed, (*said, *more)))

    start = {name: name.removeprefix(prefix) for name in plain}
    add(start)
    without = [name for name in plain if not name.startswith(prefix)]
    if prefix and 0 < len(without) < len(plain):
        below = {old: new for old, new in start.items() if old.startswith(prefix)}
        add(below, f"{len(without)} entries without '{prefix}' were left out")
    bare = {old: _WRAPPERS.sub("", new) for old, new in start.items()}
    wrappers = sorted({wrapper for name in start.values() for wrapper in _WRAPPERS.findall(name)})
    taken = [f"'{wrapper}.' was taken off its names" for wrapper in wrappers]
    if wrappers:
        add(bare, *taken)
    common = _common(bare.values())
    if common:
        cut = {old: new.removeprefix(common) for old, new in bare.items()}
        add(cut, *taken, f"'{common}' was taken off its names")
    inner = _common(own)
    if inner:
        wrapped = {old: inner + new for old, new in bare.items()}
        add(wrapped, *taken, f"'{inner}' was put before its names")
    return found


def _without_counters(
    state: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a state dict without the counters of other tools, and a sentence on them."""
    counters = [k for k in state if k.rpartition(".")[2] in _COUNTERS and k not in own]
    plain = {name: value for name, value in state.items() if name not in counters}
    kinds = sorted({name.rpartition(".")[2] for name in counters})
    return plain, ((f"its {' and '.join(kinds)} were left out",) if counters else ())


def _common(names: Iterable[str]) -> str:
    """Return the dotted prefix that all names have, with its last dot."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda each: len(set(each)) == 1, levels))


def fitting(found: Sequence[Reading], own: Mapping[str, Any]) -> Reading | None:
    """Return the first reading that fits a network's state dict exactly, if one does."""
    return next((reading for reading in found if not reading.misfits(own)), None)


def complaint(found: Sequence[Reading], own: Mapping[str, Any]) -> str:
    """Return why no reading fits a network's state dict, by the one that comes closest.

    Args:
        found: none of them fits.
        own: of the network.
    """
    closest = min(found, key=lambda reading: reading.misfits(own))
    foreign = [
        f"{k} ({_kind(value)})"
        for k, value in closest.state.items()
        if not isinstance(value, Tensor) or value.is_quantized
    ]
    if foreign:
        return (
            f"{_few(foreign)}: quantised weights and extra state are no tensors that a network in "
            "float32 takes; save the state dict of the float network, without extra state"
        )
    prefixes = _prefixes(found[0].state, own)
    if prefixes:
        choice = " or ".join(f"prefix: {prefix}" for prefix in prefixes)
        return f"its weights lie among others: write {choice}"
    missing, unexpected, unlike = (
        closest.missing(own),
        closest.unexpected(own),
        closest.unlike(own),
    )
    shapes = [f"{k} {_shape(closest.state[k])}, model has {_shape(own[k])}" for k in unlike]
    parts = [
        f"{len(keys)} {what}: {_few(keys)}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of other shape", shapes),
        )
        if keys
    ]
    head = "" if missing or unexpected else _classes(closest.state, own, unlike)
    return head + "; ".join(parts)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the prefixes under which a state dict has all that a network needs, and more."""
    first = next(iter(own), None)
    if first is None:
        return []
    tried = {name.removesuffix(first) for name in state if name.endswith(f".{first}")}
    parts = {
        prefix: Reading(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        for prefix in sorted(tried)
    }
    return [prefix for prefix, part in parts.items() if not part.misfits(own)]


def _classes(state: Mapping[str, Any], own: Mapping[str, Any], unlike: Sequence[str]) -> str:
    """Say that only the number of classes differs, if that is so."""
    if not all(isinstance(own[k], Tensor) for k in unlike):
        return ""
    sizes = {(state[k].shape[:1], own[k].shape[:1]) for k in unlike}
    rest = all(state[k].shape[1:] == own[k].shape[1:] for k in unlike)
    if len(sizes) != 1 or not rest:
        return ""
    ((theirs, ours),) = sizes
    if not theirs or not ours or theirs == ours:
        return ""
    return (
        f"its last layer has {theirs[0]} outputs, the model's {ours[0]}: the classes are "
        f"{theirs[0]} (num_classes, and what the builder is given); "
    )
