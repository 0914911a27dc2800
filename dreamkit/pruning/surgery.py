"""The record of what pruning removed, by which a student is rebuilt without the pruning library.

While torch-pruning cuts, every tensor of the model holds the position of each of its elements
instead of its values. What is left then tells which positions were kept on every axis; the values
are cut from the originals by the same slicing that later rebuilds the student.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import ArtifactError

Axes = list[list[int] | None]
"""For each axis of a tensor the positions kept, or None for all of them."""


@dataclass
class Surgery:
    """What distinguishes a pruned model from its builder's.

    Args:
        kept: by parameter or buffer name, the positions kept on every axis.
        attributes: by module name, sizes that the module states of itself (``out_channels``).
    """

    kept: dict[str, Axes] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-safe data."""
        return {"kept": self.kept, "attributes": self.attributes}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Surgery:
        """Read a record written by ``to_json``."""
        data = copy.deepcopy(dict(data))
        return Surgery(data.get("kept", {}), data.get("attributes", {}))

    def after(self, earlier: Surgery) -> Surgery:
        """Return the record of both, of which this one came second."""
        kept = dict(earlier.kept)
        for name, axes in self.kept.items():
            kept[name] = _compose(kept.get(name), axes)
        attributes = {name: dict(stated) for name, stated in earlier.attributes.items()}
        for name, stated in self.attributes.items():
            attributes.setdefault(name, {}).update(stated)
        return Surgery(kept, attributes)

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Note what is cut from ``model`` in the block, on top of what was cut before."""
        for parameter in model.parameters():
            parameter.grad = None  # of the old shape
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        before = _tensors(model)
        values = {name: tensor.detach() for name, tensor in before.items()}
        sizes = _sizes(model)
        for tensor in before.values():
            tensor.data = _positions(tensor)
        try:
            yield
            after = {name: t.detach().long() for name, t in _tensors(model).items()}
        finally:
            current = _tensors(model)
            for name, tensor in current.items():
                if name in frozen:
                    tensor.requires_grad_(False)
                if tensor.shape == values[name].shape:
                    tensor.data = values[name]
        for name, positions in after.items():
            if positions.shape != values[name].shape:
                axes = _kept_axes(name, positions, tuple(values[name].shape))
                current[name].data = _take(values[name], axes)
                self.kept[name] = _compose(self.kept.get(name), axes)
        for name, stated in _sizes(model).items():
            changed = {k: v for k, v in stated.items() if sizes[name].get(k) != v}
            if changed:
                self.attributes.setdefault(name, {}).update(changed)

    def rebuild(self, model: nn.Module) -> None:
        """Cut an unpruned model of the same builder the same way, in place.

        Raises:
            ArtifactError: the record does not fit the model.
        """
        tensors = _tensors(model)
        modules = dict(model.named_modules())
        for name, axes in self.kept.items():
            if name not in tensors or len(axes) != tensors[name].dim():
                raise ArtifactError(f"the builder's model has no tensor '{name}' of this shape")
            owner, attribute = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
            try:
                cut = _take(tensors[name].detach(), axes)
            except (IndexError, TypeError, RuntimeError) as error:
                raise ArtifactError(f"channels kept of '{name}' do not exist: {error}") from error
            if isinstance(tensors[name], nn.Parameter):
                cut = nn.Parameter(cut, tensors[name].requires_grad)
            setattr(owner, attribute, cut)
        for name, changed in self.attributes.items():
            module = modules.get(name)
            known = _sizes_of(module) if module is not None else {}
            for attribute, value in changed.items():
                if attribute not in known:
                    raise ArtifactError(f"the builder's '{name}' has no size '{attribute}'")
                size = tuple(value) if isinstance(value, list) else value
                setattr(module, attribute, size)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers that have an axis, by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.dim() > 0}


def _positions(tensor: Tensor) -> Tensor:
    # float64 counts exactly to 2^53, and unlike integers may be a Parameter that needs gradients.
    return torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(
        tensor.shape
    )


def _kept_axes(name: str, positions: Tensor, shape: tuple[int, ...]) -> Axes:
    """Read the kept positions of every axis off a cut tensor of positions."""
    axes: Axes = []
    first = positions[(0,) * positions.dim()]
    stride = 1
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, stride)
        stride *= size
    expected = torch.zeros_like(positions)
    for axis, size in enumerate(shape):
        line = positions[tuple(slice(None) if a == axis else 0 for a in range(len(shape)))]
        kept = (line // strides[axis]) % size
        axes.append(None if len(kept) == size else kept.tolist())
        view = [-1 if a == axis else 1 for a in range(len(shape))]
        expected = expected + (kept * strides[axis]).view(view)
    if not torch.equal(expected, positions):
        raise RuntimeError(f"'{name}' was not cut along its axes (first position {int(first)})")
    return axes


def _take(tensor: Tensor, axes: Axes) -> Tensor:
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


def _sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: _sizes_of(module) for name, module in model.named_modules()}


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
