"""Changing how many channels and blocks a model has, and the record to do that again by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import ArtifactError
from dreamkit.pruning.blocks import bypass
from dreamkit.pruning.channels import Use

Axes = list[list[int] | None]
"""For each axis of a tensor the positions kept, or None for all of them."""


@dataclass
class PruningRecord:
    """What distinguishes the shape of a model from its builder's.

    Args:
        kept: by parameter or buffer name, the positions kept on every axis.
        attributes: by module name, sizes that the module states of itself (``out_channels``).
        grown: by parameter name, how many outputs it has that had fewer.
        bypassed: names of the residual blocks that are gone.
        patterns: by parameter name, the pattern of zeros that it was pruned to, as ``2:4``.
    """

    kept: dict[str, Axes] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)
    bypassed: list[str] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-safe data."""
        return {
            "kept": self.kept,
            "attributes": self.attributes,
            "grown": self.grown,
            "bypassed": self.bypassed,
            "patterns": self.patterns,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PruningRecord:
        """Read a record written by ``to_json``.

        Raises:
            ArtifactError: it is none.
        """
        try:
            found = PruningRecord(
                {name: _checked_axes(axes) for name, axes in data.get("kept", {}).items()},
                {name: dict(sizes) for name, sizes in data.get("attributes", {}).items()},
                {name: int(outputs) for name, outputs in data.get("grown", {}).items()},
                _checked_names(data.get("bypassed", [])),
                {name: str(text) for name, text in data.get("patterns", {}).items()},
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"what was pruned is not a record of it: {error}") from error
        return found

    def after(self, earlier: PruningRecord) -> PruningRecord:
        """Return the record of both, of which this one came second."""
        kept = dict(earlier.kept)
        for name, axes in self.kept.items():
            kept[name] = _compose(kept.get(name), axes)
        attributes = {name: dict(stated) for name, stated in earlier.attributes.items()}
        for name, stated in self.attributes.items():
            attributes.setdefault(name, {}).update(stated)
        bypassed = [*dict.fromkeys([*earlier.bypassed, *self.bypassed])]
        grown = {**earlier.grown, **self.grown}
        patterns = {**earlier.patterns, **self.patterns}
        return PruningRecord(kept, attributes, grown, bypassed, patterns)

    def kept_since(self, earlier: PruningRecord) -> dict[str, Axes]:
        """Return the positions kept of those that the same pruning had kept at an earlier time.

        Args:
            earlier: this record as it was then.
        """
        kept = {}
        for name, axes in self.kept.items():
            before = earlier.kept.get(name, [None] * len(axes))
            kept[name] = [_among(now, then) for now, then in zip(axes, before, strict=True)]
        return kept

    # --- cutting ------------------------------------------------------------------------------

    def bypass(self, model: nn.Module, block: str) -> None:
        """Let the input of a residual block through in its place, and record it."""
        bypass(model, [block])
        self.bypassed.append(block)

    def cut(self, model: nn.Module, use: Use, kept: Sequence[int]) -> None:
        """Keep some channels of a layer, in place, and record it.

        Args:
            model: whose layer.
            use: an axis of the layer.
            kept: positions along that axis.
        """
        for name, dim in use.tensors.items():
            self._take(model, name, dim, kept)
        module = model.get_submodule(use.name) if use.sizes else model
        for size in use.sizes:
            several = isinstance(getattr(module, size), tuple)
            self._state(module, use.name, {size: (len(kept),) if several else len(kept)})

    def _take(self, model: nn.Module, name: str, dim: int, kept: Sequence[int]) -> None:
        owner, _, key = name.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(owner), key)
        # All groups keep the same places: those of the first tell what a filter keeps.
        places = [place for place in kept if place < tensor.shape[dim]]
        axes: Axes = [places if axis == dim else None for axis in range(tensor.dim())]
        _replace(model, name, select(tensor.detach(), axes))
        self.kept[name] = _compose(self.kept.get(name), axes)

    def _state(self, module: nn.Module, name: str, sizes: Mapping[str, Any]) -> None:
        for key, value in sizes.items():
            setattr(module, key, value)
            self.attributes.setdefault(name, {})[key] = value

    # --- growing ------------------------------------------------------------------------------

    def grow(self, model: nn.Module, name: str, size: str, weights: Mapping[str, Tensor]) -> None:
        """Give a layer more outputs, in place, and record it.

        Args:
            model: whose layer.
            name: of the layer.
            size: of its attributes the one that tells how many outputs it has.
            weights: by parameter of the layer, what the new outputs have; along axis 0.
        """
        module = model.get_submodule(name)
        count = len(next(iter(weights.values())))
        for key, new in weights.items():
            full = f"{name}.{key}" if name else key
            old = _tensors(model)[full].detach()
            _replace(model, full, torch.cat([old, new.to(old)]))
            self.grown[full] = len(old) + len(new)
        self._state(module, name, {size: getattr(module, size) + count})

    # --- repeating ----------------------------------------------------------------------------

    def rebuild(self, model: nn.Module) -> None:
        """Cut and grow an unpruned model of the same builder the same way, in place.

        Raises:
            ArtifactError: the record does not fit the model.
        """
        tensors = _tensors(model)
        modules = dict(model.named_modules())
        for name, axes in self.kept.items():
            if name not in tensors or len(axes) != tensors[name].dim():
                raise ArtifactError(f"the builder's model has no tensor '{name}' of this shape")
            try:
                cut = select(tensors[name].detach(), axes)
            except (IndexError, TypeError, RuntimeError) as error:
                raise ArtifactError(f"channels kept of '{name}' do not exist: {error}") from error
            _replace(model, name, cut)
        for name, outputs in self.grown.items():
            self._grow_again(model, tensors, name, outputs)
        for name, changed in self.attributes.items():
            module = modules.get(name)
            known = _sizes_of(module) if module is not None else {}
            for attribute, value in changed.items():
                if attribute not in known:
                    raise ArtifactError(f"the builder's '{name}' has no size '{attribute}'")
                size = tuple(value) if isinstance(value, list) else value
                setattr(module, attribute, size)
        bypass(model, self.bypassed)

    def _grow_again(
        self, model: nn.Module, tensors: Mapping[str, Tensor], name: str, outputs: int
    ) -> None:
        """Give a parameter of an unpruned model the rows that it lacks, with zeros."""
        had = len(tensors[name]) if name in tensors else 0
        if type(outputs) is not int or not 0 < had <= outputs:
            raise ArtifactError(f"the builder's model has no '{name}' that could be grown")
        now = _tensors(model)[name].detach()
        _replace(model, name, torch.cat([now, now.new_zeros(outputs - had, *now.shape[1:])]))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers that have an axis, by name; what has several, by each."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: tensor for name, tensor in named if tensor.dim() > 0}


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, key)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, old.requires_grad)
    setattr(owner, key, value)


def _checked_axes(axes: Any) -> Axes:
    """Return positions kept, which ascend: no file makes a tensor larger than it was."""
    found: Axes = []
    for kept in axes:
        if kept is not None:
            before = -1
            for place in kept:
                if type(place) is not int or place <= before:
                    raise ValueError("positions kept should ascend")
                before = place
        found.append(None if kept is None else list(kept))
    return found


def _checked_names(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("blocks that are gone should be a list of names")
    return names


def select(tensor: Tensor, axes: Axes) -> Tensor:
    """Return what is kept of a tensor, as a new one."""
    for axis, kept in enumerate(axes):
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
    return tensor.contiguous()


def _compose(earlier: Axes | None, later: Axes) -> Axes:
    if earlier is None:
        return later
    composed: Axes = []
    for first, second in zip(earlier, later, strict=True):
        if first is None or second is None:
            composed.append(second if first is None else first)
        else:
            composed.append([first[i] for i in second])
    return composed


def _among(now: list[int] | None, then: list[int] | None) -> list[int] | None:
    if now is None or then is None:
        return now
    places = {position: place for place, position in enumerate(then)}
    return [places[position] for position in now]


def _sizes_of(module: nn.Module) -> dict[str, Any]:
    """Return the integers and tuples of integers that a module keeps as attributes."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, bool)
        and (
            isinstance(value, int)
            or (isinstance(value, tuple) and value and all(type(v) is int for v in value))
        )
    }
