"""Operators of ONNX in PyTorch, with gradients: those that networks for images are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamkit.errors import DreamkitError


@dataclass(frozen=True)
class Operator:
    """An operator in a graph.

    Args:
        name: of the node.
        kind: ``Conv`` and so on.
        inputs: names of the tensors that go in; empty where one is left out.
        output: name of the tensor that comes out.
        attributes: as ONNX has them.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def run(self, *values: Tensor | None) -> Tensor:
        """Return the output for the inputs, None where one is left out.

        Raises:
            DreamkitError: it is none of those that are known, or is used in a way that is not.
        """
        if self.kind not in _OPERATORS:
            raise DreamkitError(
                f"there is no gradient of the operator {self.kind} ({self.name}) here; known are "
                f"{', '.join(sorted(_OPERATORS))}"
            )
        found: Tensor = _OPERATORS[self.kind](self, *values)
        return found

    def pads(self, dims: int) -> tuple[list[int], list[int]]:
        """Return what is added before and after each of the last axes.

        Raises:
            DreamkitError: it depends on the input's size.
        """
        if self.attributes.get("auto_pad", b"NOTSET") not in {b"NOTSET", b"VALID"}:
            raise DreamkitError(f"padding by the input's size is not known here ({self.name})")
        pads = list(self.attributes.get("pads", [0] * 2 * dims))
        return pads[:dims], pads[dims:]


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes, as many as are given."""
    around = [side for both in zip(before, after, strict=True) for side in reversed(both)]
    around.reverse()  # torch has the last axis first
    return F.pad(x, around, value=value) if any(around) else x


def _conv(op: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = weight.dim() - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(
        pad(x, *op.pads(dims)),
        weight,
        bias,
        stride=tuple(op.attributes.get("strides", [1] * dims)),
        dilation=tuple(op.attributes.get("dilations", [1] * dims)),
        groups=op.attributes.get("group", 1),
    )


def _gemm(op: Operator, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if op.attributes.get("transA") else a
    b = b.T if op.attributes.get("transB") else b
    product: Tensor = op.attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + op.attributes.get("beta", 1.0) * c


def _clip(op: Operator, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _max_pool(op: Operator, x: Tensor) -> Tensor:
    dims = x.dim() - 2
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    before, after = op.pads(dims)
    if before != after:
        x, before = pad(x, before, after, value=-torch.inf), [0] * dims
    found: Tensor = pool(
        x,
        op.attributes["kernel_shape"],
        op.attributes.get("strides", [1] * dims),
        padding=before,
        dilation=op.attributes.get("dilations", [1] * dims),
        ceil_mode=bool(op.attributes.get("ceil_mode", 0)),
    )
    return found


def _average_pool(op: Operator, x: Tensor) -> Tensor:
    dims = x.dim() - 2
    before, after = op.pads(dims)
    if before != after:
        raise DreamkitError(f"padding that is not the same on both sides is not known ({op.name})")
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    return pool(
        x,
        op.attributes["kernel_shape"],
        op.attributes.get("strides", [1] * dims),
        padding=before,
        ceil_mode=bool(op.attributes.get("ceil_mode", 0)),
        count_include_pad=bool(op.attributes.get("count_include_pad", 0)),
    )


def _reduce_mean(op: Operator, x: Tensor, axes: Tensor | None = None) -> Tensor:
    over = list(range(x.dim())) if axes is None else axes.tolist()
    return x.mean(over, keepdim=bool(op.attributes.get("keepdims", 1)))


def _reshape(op: Operator, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not op.attributes.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(op: Operator, x: Tensor) -> Tensor:
    axis = op.attributes.get("axis", 1)
    return x.reshape(x.shape[:axis].numel(), -1)


def _pad(
    op: Operator, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    if op.attributes.get("mode", b"constant") != b"constant":
        raise DreamkitError(f"padding by mirroring is not known here ({op.name})")
    given, over = pads.tolist(), range(x.dim()) if axes is None else axes.tolist()
    before, after = [0] * x.dim(), [0] * x.dim()
    for number, axis in enumerate(over):
        before[axis], after[axis] = given[number], given[number + len(given) // 2]
    return pad(x, before, after, 0.0 if value is None else float(value))


def _slice(
    op: Operator,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    over = range(len(starts)) if axes is None else axes.tolist()
    by = [1] * len(starts) if steps is None else steps.tolist()
    found = [slice(None)] * x.dim()
    for axis, start, end, step in zip(over, starts.tolist(), ends.tolist(), by, strict=True):
        if step < 1:
            raise DreamkitError(f"slices that run backwards are not known here ({op.name})")
        found[axis] = slice(start, end, step)
    return x[tuple(found)]


def _hard_sigmoid(op: Operator, x: Tensor) -> Tensor:
    slope, shift = op.attributes.get("alpha", 0.2), op.attributes.get("beta", 0.5)
    found: Tensor = (slope * x + shift).clamp(0, 1)
    return found


_OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Add": lambda op, a, b: a + b,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda op, *parts: torch.cat(parts, op.attributes["axis"]),
    "Conv": _conv,
    "Div": lambda op, a, b: a / b,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda op, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda op, x: F.hardswish(x),
    "Identity": lambda op, x: x,
    "LeakyRelu": lambda op, x: F.leaky_relu(x, op.attributes.get("alpha", 0.01)),
    "MatMul": lambda op, a, b: a @ b,
    "MaxPool": _max_pool,
    "Min": lambda op, a, b: torch.minimum(a, b),
    "Mul": lambda op, a, b: a * b,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": lambda op, x: F.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda op, x: x.sigmoid(),
    "Slice": _slice,
    "Sub": lambda op, a, b: a - b,
    "Transpose": lambda op, x: x.permute(*op.attributes["perm"]),
}
