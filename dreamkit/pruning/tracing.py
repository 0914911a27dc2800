"""Following channels through a model: which of them every layer reads and makes.

One image goes through the model. Beside every activation goes a tensor of its shape that tells, for
each element, the channel it belongs to. What moves elements about (views, concatenations, shuffles)
moves these numbers the same way; where two channels meet in a sum or a product, they become one,
since none can go without the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dreamkit.model_state import device_of, eval_mode

aten = torch.ops.aten
NONE = 0
"""Stands for what is no channel: the image, constants, padding."""

_MOVING = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze),
    *(aten.squeeze, aten.permute, aten.transpose, aten.t, aten.expand, aten.slice, aten.select),
    *(aten.split, aten.split_with_sizes, aten.unbind, aten.cat, aten.stack, aten.clone),
    *(aten.contiguous, aten.alias, aten.detach, aten.flip, aten.roll),
    *(aten.constant_pad_nd, aten.pixel_shuffle, aten.pixel_unshuffle, aten.repeat),
    *(aten.channel_shuffle, aten.native_channel_shuffle, aten.movedim),
}
_REDUCING = {aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std}
_POOLING = {
    *(aten.avg_pool2d, aten.max_pool2d_with_indices, aten._adaptive_avg_pool2d),
    *(aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d),
    *(aten.reflection_pad2d, aten.replication_pad2d, aten.avg_pool1d, aten.upsample_nearest1d),
}
_IN_PLACE_OF_EACH = {
    *(aten._softmax, aten._log_softmax, aten.native_dropout, aten._to_copy, aten.copy_),
    *(aten.hardswish, aten.hardswish_, aten.mish, aten.mish_, aten.relu6, aten.relu6_),
    aten.as_strided_,  # of a pooled map, to change its layout
    *(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like),
}
"""Operations that leave every element where it is, though PyTorch does not tag them so."""


@dataclass
class Use:
    """The channels along one axis of a layer, in its order.

    Args:
        name: of the layer, or of a parameter outside any.
        axis: ``out``, ``in``, ``parameter`` or ``attribute:NAME`` for a number of channels that a
            module keeps.
        labels: the channel of each position; ``NONE`` for none.
    """

    name: str
    axis: str
    labels: list[int]


class Trace:
    """What is known of a model's channels.

    ``uses`` are the axes of all layers that have channels; ``cuts`` the channels before each place
    at which the code cuts an activation, in the order of its run. ``slices`` are the channels that
    are cut at one place, each with the uses that may hold its number. ``outputs`` are the channels
    of the first output, one after the other.
    """

    def __init__(self) -> None:
        self.uses: dict[tuple[str, str], Use] = {}
        self.cuts: list[list[int]] = []
        self.slices: list[tuple[list[int], list[tuple[str, str]]]] = []
        self.outputs: list[int] = []
        self._parents: list[int] = [NONE]
        self._blocked: dict[int, str] = {}

    def fresh(self, count: int) -> list[int]:
        """Return new channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return list(range(first, first + count))

    def find(self, label: int) -> int:
        """Return the channel that stands for all those that it has met."""
        root = label
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[label] != root:
            self._parents[label], label = root, self._parents[label]
        return root

    def roots(self, labels: Tensor) -> Tensor:
        """Return what stands for each label."""
        values, inverse = labels.unique(return_inverse=True)
        found = torch.tensor([self.find(value) for value in values.tolist()], dtype=torch.int64)
        return found[inverse].view(labels.shape)

    def couple(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Make one of channels that meet, pair by pair."""
        for a, b in zip(first, second, strict=True):
            if a == NONE or b == NONE:
                continue
            low, high = sorted((self.find(a), self.find(b)))
            if low != high:
                self._parents[high] = low
                if high in self._blocked:
                    self._blocked.setdefault(low, self._blocked.pop(high))

    def couple_tensors(self, first: Tensor, second: Tensor) -> None:
        """Make one of the channels that meet in two tensors of one shape."""
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)], 1).unique(dim=0).tolist()
        self.couple([a for a, _ in pairs], [b for _, b in pairs])

    def block(self, labels: Tensor | Sequence[int], reason: str) -> None:
        """Rule out that some channels are removed."""
        values = labels.unique().tolist() if isinstance(labels, Tensor) else set(labels)
        for label in values:
            if label != NONE:
                self._blocked.setdefault(self.find(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why a channel cannot be removed; None if it can."""
        return self._blocked.get(self.find(label))

    def record(self, name: str, axis: str, labels: Sequence[int]) -> None:
        """Note an axis; where a layer is called again, what it is given must go together."""
        known = self.uses.setdefault((name, axis), Use(name, axis, list(labels)))
        if len(known.labels) == len(labels):
            self.couple(known.labels, labels)
        else:
            self.block([*known.labels, *labels], f"{name} is called with different channels")


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Follow channels through a model, which stays as it is.

    Args:
        model: run once, in eval mode.
        input_size: (channels, height, width).
    """
    tracer = _Tracer(model)
    example = torch.zeros(1, *input_size, device=device_of(model))
    with torch.no_grad(), eval_mode(model), tracer.hooked(), tracer:
        outputs = model(example)
    for output in tree_flatten(outputs)[0]:
        if isinstance(output, Tensor):
            labels = tracer.labels(output)
            tracer.trace.block(labels, "makes the model's outputs")
            tracer.trace.outputs = tracer.trace.outputs or labels.reshape(-1).tolist()
    return tracer.trace


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is followed as a whole: a layer with weights of its channels."""
    kinds = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    return isinstance(module, kinds) or isinstance(getattr(module, "running_mean", None), Tensor)


def is_depthwise(module: object) -> bool:
    """Whether every channel has a filter of its own."""
    return (
        isinstance(module, _ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


class _Tracer(TorchDispatchMode):
    """Sees every operation that no layer stands for, and every layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.trace = Trace()
        self.inside = 0
        self.under_way: list[tuple[str, nn.Module]] = []
        self.known: dict[int, Tensor] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters()}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow every layer's calls."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                enter, leave = self._hooks(name, module)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                handle = module.register_forward_hook(leave, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Any]:
        leaf = is_leaf(module)

        def enter(module: nn.Module, inputs: Any) -> None:
            if leaf:
                self.inside += 1
            elif not self.inside:
                self.under_way.append((name, module))

        def leave(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if leaf:
                self.inside -= 1
                if not self.inside:
                    x = inputs[0] if inputs else next(iter(named.values()))
                    self._set(output, self._layer(name, module, x, output))
            elif not self.inside:
                self.under_way.pop()

        return enter, leave

    # --- labels -------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor:
        """Return the channel of every element."""
        known = self.known.get(id(tensor), getattr(tensor, "_channels", None))
        if known is not None:
            found: Tensor = known
            return found
        found = torch.zeros(tensor.shape, dtype=torch.int64)
        wide = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        if id(tensor) in self.parameters and len(wide) == 1:
            # A scale or a shift outside any layer: it goes with the channels that it meets.
            count = tensor.shape[wide[0]]
            found = torch.tensor(self.trace.fresh(count)).view(tensor.shape)
            self.trace.record(self.parameters[id(tensor)], "parameter", found.reshape(-1).tolist())
            self.known[id(tensor)] = found  # not on the tensor, which outlives the trace
        return found

    def _set(self, tensor: Any, labels: Tensor | None) -> None:
        if isinstance(tensor, Tensor) and labels is not None:
            tensor._channels = labels  # type: ignore[attr-defined]

    def _along(self, labels: Tensor, dim: int, where: str) -> list[int]:
        """Return the channel of each position along an axis, which must be one and the same."""
        moved = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)
        found = moved.amax(1)
        if not bool(((moved == NONE) | (moved == found[:, None])).all()):
            roots = self.trace.roots(moved)
            found = roots.amax(1)
            if not bool(((roots == NONE) | (roots == found[:, None])).all()):
                self.trace.block(labels, f"they are mixed before {where}")
        return found.tolist()

    def _varying(self, labels: Tensor) -> list[int]:
        """Return the axes along which there are different channels."""
        high = self.trace.roots(labels)
        low = high.masked_fill(high == NONE, torch.iinfo(torch.int64).max)
        return [
            dim
            for dim in range(high.dim())
            if high.shape[dim] > 1 and bool((low.amin(dim) < high.amax(dim)).any())
        ]

    # --- layers -------------------------------------------------------------------------------

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Any) -> Tensor | None:
        """Return the channels of a layer's output."""
        labels, trace = self.labels(x), self.trace
        if isinstance(module, _ConvNd):
            return self._convolution(name, module, labels, output)
        if isinstance(module, nn.Linear):
            trace.record(name, "in", self._along(labels, -1, name))
            made = trace.fresh(module.out_features)
            trace.record(name, "out", made)
            return torch.tensor(made).expand(output.shape)
        last = isinstance(module, nn.LayerNorm) and not type(module).__name__.endswith("2d")
        dim = x.dim() - 1 if last else 1
        sizes = {p.numel() for p in [*module.parameters(False), *module.buffers(False)]}
        if sizes <= {0, 1}:
            return labels
        if x.shape[dim] not in sizes:
            trace.block(labels, f"{name} normalises more than channels")
            return labels
        along = self._along(labels, dim, name)
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            self._couple_groups(along, module.num_groups)
        trace.record(name, "out", along)
        return labels

    def _convolution(
        self, name: str, module: _ConvNd, labels: Tensor, output: Tensor
    ) -> Tensor | None:
        trace, groups = self.trace, module.groups
        along = self._along(labels, 1, name)
        if module.transposed:
            trace.block(along, f"{name} is transposed")
            return None
        if is_depthwise(module):
            trace.record(name, "out", along)
            made = along
        else:
            if groups > 1:
                self._couple_groups(along, groups)
            trace.record(name, "in", along)
            made = trace.fresh(module.out_channels // groups) * groups
            trace.record(name, "out", made)
        shape = [1, -1, *[1] * (output.dim() - 2)]
        return torch.tensor(made).view(shape).expand(output.shape)

    def _couple_groups(self, along: list[int], groups: int) -> None:
        """Make one of the channels at the same place of each group: all must keep as many."""
        size = len(along) // groups
        for first in range(size, len(along), size):
            self.trace.couple(along[:size], along[first : first + size])

    # --- operations ---------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not self.inside:
            self._follow(func, args, kwargs or {}, outputs)
        return outputs

    def _follow(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        labelled = [t for t in inputs if bool((self.labels(t) != NONE).any())]
        if not labelled:
            return
        operation = func.overloadpacket
        if operation in _MOVING:
            self._move(func, args, kwargs, outputs)
        elif operation in _POOLING:
            pooled = outputs[0] if isinstance(outputs, tuple) else outputs
            along = self._along(self.labels(args[0]), 1, str(operation))
            shape = [1, -1, *[1] * (pooled.dim() - 2)]
            self._set(pooled, torch.tensor(along).view(shape).expand(pooled.shape))
        elif operation in _REDUCING and isinstance(outputs, Tensor):
            self._reduce(args, kwargs, outputs)
        elif operation in _IN_PLACE_OF_EACH or _is_pointwise(func):
            self._meet(operation, labelled, outputs)
        else:
            for tensor in labelled:
                self.trace.block(self.labels(tensor), f"they go through {operation}")

    def _meet(self, operation: Any, labelled: list[Tensor], outputs: Any) -> None:
        """Follow an operation element by element: sums, products, activations."""
        found = tree_flatten(outputs)[0]
        output = found[0] if found and isinstance(found[0], Tensor) else None
        together: Tensor | None = None
        for tensor in labelled:
            labels = self.labels(tensor)
            if output is None or not _broadcasts(labels.shape, output.shape):
                self.trace.block(labels, f"they go through {operation}")
                continue
            labels = labels.expand(output.shape)
            if together is None:
                together = labels
                continue
            if self._partial(labels) or self._partial(together):
                for met in (labels, together):
                    self.trace.block(met, "some of them meet constants where others meet channels")
            self.trace.couple_tensors(together, labels)
            together = torch.where(together == NONE, labels, together)
        self._set(output, together)

    def _partial(self, labels: Tensor) -> bool:
        """Whether an axis has channels in some places and none in others."""
        for dim in self._varying(labels):
            along = labels.movedim(dim, 0).reshape(labels.shape[dim], -1).amax(1)
            if bool((along == NONE).any()):
                return True
        return False

    def _reduce(self, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow a mean or a sum: over positions channels stay, over channels they are gone."""
        labels = self.labels(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(labels.dim()))
        dims = [dim % labels.dim() for dim in dims]
        varying = set(self._varying(labels))
        mixed = sorted(varying & set(dims))
        if mixed and varying <= set(dims):
            return
        for dim in mixed:  # channels of several that are added up, as of stacked branches
            first = labels.narrow(dim, 0, 1)
            for place in range(1, labels.shape[dim]):
                self.trace.couple_tensors(first, labels.narrow(dim, place, 1))
        kept = labels.amax(dims, keepdim=output.dim() == labels.dim())
        self._set(output, kept)

    def _move(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Follow an operation that moves elements: it moves their channels the same way."""
        operation = func.overloadpacket
        source = args[0] if isinstance(args[0], Tensor) else None
        if source is not None:
            labels = self.labels(source)
            self._check_cuts(operation, args, kwargs, labels)
        moved = func(*tree_map(self._labels_of, args), **tree_map(self._labels_of, kwargs))
        pairs = zip(tree_flatten(outputs)[0], tree_flatten(moved)[0], strict=True)
        for output, found in pairs:
            if source is not None and len(self._varying(labels)) == 1:
                self._couple_split(found)
            self._set(output, found.clone())

    def _labels_of(self, value: Any) -> Any:
        # Contiguous: a view of what it goes beside may not be one of an expanded tensor.
        return self.labels(value).contiguous() if isinstance(value, Tensor) else value

    def _couple_split(self, moved: Tensor) -> None:
        """Make one of channels that a view put side by side: (groups, channels), say.

        The groups stay as many, so what goes of one goes of all.
        """
        varying = self._varying(moved)
        for dim in varying[:-1]:
            first = moved.narrow(dim, 0, 1)
            for place in range(1, moved.shape[dim]):
                self.trace.couple_tensors(first, moved.narrow(dim, place, 1))

    def _check_cuts(self, operation: Any, args: Any, kwargs: Any, labels: Tensor) -> None:
        """Look at operations that cut at some channel: their code may have its number."""
        varying = self._varying(labels)

        def argument(place: int, name: str, default: Any) -> Any:
            return args[place] if len(args) > place else kwargs.get(name, default)

        if operation is aten.constant_pad_nd:
            padded = {labels.dim() - 1 - i // 2 for i, n in enumerate(args[1]) if n}
            if padded & set(varying):
                self.trace.block(
                    labels, "its channels meet others beside padded zeros, which shift them"
                )
        elif operation is aten.slice or operation is aten.select:
            dim = argument(1, "dim", 0) % labels.dim()
            if dim not in varying:
                return
            size = labels.shape[dim]
            if operation is aten.select:
                index = args[2] % size
                self.trace.block(
                    labels.narrow(dim, 0, index + 1), "one of them is picked by number"
                )
                return
            start, end = argument(2, "start", 0) or 0, argument(3, "end", None)
            if argument(4, "step", 1) != 1:
                self.trace.block(labels, "the code takes every few of them")
            for cut in (start, size if end is None else end):
                place = cut + size if cut < 0 else cut
                if 0 < place < size:
                    self._note_cut(labels, dim, place)
                    held = self._kept_number(labels, dim, place)
                    self.trace.slices.append((self._along(labels, dim, "a cut"), held))
        elif operation in (aten.split, aten.split_with_sizes):
            self._check_split(labels, args[1], argument(2, "dim", 0) % labels.dim(), varying)

    def _check_split(
        self, labels: Tensor, parts: int | Sequence[int], dim: int, varying: list[int]
    ) -> None:
        if dim not in varying:
            return
        size = labels.shape[dim]
        if isinstance(parts, int):
            parts = [parts] * (size // parts) + ([size % parts] if size % parts else [])
        if len(set(parts)) > 1:
            self.trace.block(labels, "the code splits them into unequal parts")
            return
        self._note_cut(labels, dim, parts[0])
        first = labels.narrow(dim, 0, parts[0])
        for number in range(1, len(parts)):
            self.trace.couple_tensors(first, labels.narrow(dim, number * parts[0], parts[0]))
        self._kept_number(labels, dim, parts[0])
        self._kept_number(labels, dim, size)

    def _note_cut(self, labels: Tensor, dim: int, place: int) -> None:
        """Remember which channels come before a cut, to see whether they still do without some."""
        self.trace.cuts.append(self._along(labels, dim, "a cut")[:place])

    def _kept_number(self, labels: Tensor, dim: int, count: int) -> list[tuple[str, str]]:
        """Record attributes of the module under way that hold a number of channels.

        Whether they are what the code cuts at is seen when the model runs without some.
        """
        name, module = self.under_way[-1]
        held = [key for key, value in numbers_of(module).items() if value == count]
        along = self._along(labels, dim, name)[:count]
        for key in held:
            self.trace.record(name, f"attribute:{key}", along)
        return [(name, f"attribute:{key}") for key in held]


def numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module keeps as attributes."""
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_") and value > 1
    }


def _is_pointwise(func: Any) -> bool:
    """Whether PyTorch tags an operation, or what it does in place, as one element by element."""
    if torch.Tag.pointwise in func.tags:
        return True
    base = getattr(aten, func.overloadpacket.__name__.removesuffix("_"), None)
    if base is None or func._overloadname not in base.overloads():
        return False
    return torch.Tag.pointwise in getattr(base, func._overloadname).tags


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return all(own in (1, other) for own, other in pairs)
