"""Where one tensor holds all that a network goes on with, so that a student can be compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from dreamkit.graph_edges import Edge, edge
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.difference_statistics import Kept

MOST_PREFIX = 8
"""Tokens before those of the patches, of the class and registers, that a feature may have."""


class Waist(NamedTuple):
    """What a layer is given that is all that a network goes on with.

    Its shape, the axis of its channels, and how much of the way from the images to the outputs lies
    before it: the share of the layers that are looked at.
    """

    shape: torch.Size
    axis: int
    way: float


@dataclass(frozen=True)
class FeaturePoint:
    """A layer of the teacher that is given all that a network goes on with, and the student's.

    Args:
        name: of the teacher's layer; what it is given is the feature.
        axis: of the feature's channels.
        channels: positions of the student's channels among the teacher's, None for all.
        own: name of the student's layer, None for the same.
        widths: how many channels the student's feature and the teacher's have, where they are not
            the same ones: a regressor is to bring one to the other. None where they are.
        maps: axes of the channels of the student's feature and the teacher's, where the two are
            compared as maps (N, C, H, W) of the lower resolution. None where as they are.
    """

    name: str
    axis: int
    channels: Tensor | None
    own: str | None = None
    widths: tuple[int, int] | None = None
    maps: tuple[int, int] | None = None

    @property
    def layer(self) -> str:
        """Name of the student's layer."""
        return self.name if self.own is None else self.own

    def of_teacher(self, feature: Tensor) -> Tensor:
        """Return the teacher's feature without the channels that the student lacks."""
        return feature if self.channels is None else feature.index_select(self.axis, self.channels)

    def left_of(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the student's feature, by that of the teacher's."""
        sizes = list(shape)
        if self.channels is not None:
            sizes[self.axis] = len(self.channels)
        return torch.Size(sizes)


def comparison_points(
    teacher: nn.Module, student: nn.Module, kept: Kept, images: Tensor
) -> list[FeaturePoint]:
    """Return where a student's features are compared with its teacher's, whatever the student is.

    A student that was made from the teacher, or has its layers, is compared layer by layer:
    ``feature_points``. Of any other each waist is held against the teacher's at the same share of
    the way from the images to the outputs, maps and tokens against one another, at the lower of the
    two resolutions, and vectors against vectors. A regressor stands between (FitNets: Romero et
    al., ICLR 2015, who do so at one place).

    Args:
        teacher: with a graph from its images to its outputs.
        student: likewise.
        kept: which of the teacher's channels a student has that was made from it; else empty.
        images: normalised, (N, C, H, W), on the device of both.

    Returns:
        Maps, then vectors, in forward order; empty if the two have neither in common.
    """
    if kept:
        return feature_points(teacher, student, kept, images)
    theirs, own = _waists(teacher, images), _waists(student, images)
    shapes = [{name: w.shape for name, w in waists.items()} for waists in (own, theirs)]
    if own and shapes[0].items() <= shapes[1].items():
        return [_point(name, teacher.get_submodule(name), kept, images.device) for name in own]
    theirs, own = (_waists(model, images, grouped=True) for model in (teacher, student))
    found = []
    for dimensions in ({3, 4}, {2}):
        given, wanted = (
            [(name, w) for name, w in waists.items() if _comparable(w, dimensions)]
            for waists in (own, theirs)
        )
        for (layer, mine), (name, its) in _at_equal_depth(given, wanted):
            widths = mine.shape[mine.axis], its.shape[its.axis]
            if dimensions == {2}:
                found.append(FeaturePoint(name, -1, None, layer, widths))
            else:
                found.append(FeaturePoint(name, 1, None, layer, widths, (mine.axis, its.axis)))
    return found


def patch_grid(tokens: int) -> tuple[int, int] | None:
    """Return the side of the square of patches that so many tokens are, and how many precede it.

    None if they are no square, but for up to ``MOST_PREFIX`` tokens.
    """
    side = math.isqrt(tokens)
    before = tokens - side * side
    return (side, before) if before <= MOST_PREFIX and side > 1 else None


def _comparable(waist: Waist, dimensions: set[int]) -> bool:
    shape = waist.shape
    return len(shape) in dimensions and (len(shape) != 3 or patch_grid(shape[1]) is not None)


def _at_equal_depth(
    own: list[tuple[str, Waist]], theirs: list[tuple[str, Waist]]
) -> list[tuple[tuple[str, Waist], tuple[str, Waist]]]:
    """Return each of the shorter list with the nearest of the other, which the nearest one has."""
    short, long = sorted((own, theirs), key=len)
    found: dict[str, tuple[float, tuple[str, Waist], tuple[str, Waist]]] = {}
    for one in short:
        distance, other = min(
            ((abs(one[1].way - other[1].way), other) for other in long), key=lambda pair: pair[0]
        )
        if other[0] not in found or distance < found[other[0]][0]:
            found[other[0]] = distance, one, other
    pairs = [(one, other) for _, one, other in found.values()]
    return pairs if short is own else [(other, one) for one, other in pairs]


def feature_points(
    teacher: nn.Module, student: nn.Module, kept: Kept, images: Tensor
) -> list[FeaturePoint]:
    """Return the layers by whose inputs a student can be compared with what it was made from.

    These are convolutions, linear layers and norms of tokens whose input is a waist of the network:
    every path from the images to the outputs goes through it. It is what a block with a residual
    sum around it puts out, and what any layer of a plain network does; a block's inside is not one.
    So a student that has them right has all right, and is free in how it comes to them. (In graphs'
    terms: the node dominates the output.)

    Args:
        teacher: with a graph from its images to its outputs.
        student: made from it.
        kept: which of the teacher's channels the student has.
        images: normalised, (N, C, H, W), on the device of both.

    Returns:
        In forward order; none of two layers is given the same tensor, none the images themselves.
    """
    given = _waists(teacher, images)
    shapes: dict[str, torch.Size] = {}
    layers = dict(student.named_modules())
    watched = [(name, layers[name]) for name in given if name in layers]

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        shapes[name] = x.shape

    with torch.no_grad(), eval_mode(student), hooked(watched, see):
        student(images)
    found = []
    for name, waist in given.items():
        point = _point(name, teacher.get_submodule(name), kept, images.device)
        if name in shapes and point.left_of(waist.shape) == shapes[name]:
            found.append(point)
    return found


def _point(name: str, layer: nn.Module, kept: Kept, device: torch.device) -> FeaturePoint:
    axes = kept.get(f"{name}.weight")
    read = None if axes is None else axes[0 if isinstance(layer, nn.LayerNorm) else 1]
    chosen = None if read is None else torch.tensor(read, device=device)
    return FeaturePoint(name, _channel_axis(layer), chosen)


def _channel_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv2d) else -1


def _sees_tokens(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether a norm is given tokens (N, L, C) or maps (N, H, W, C), not (N, C, H, W)."""
    (width, *more) = reversed(norm.normalized_shape)
    if more or x.shape[-1] != width:
        return False
    return x.ndim == 3 or (x.ndim == 4 and x.shape[1] != width)


def _waists(model: nn.Module, images: Tensor, grouped: bool = False) -> dict[str, Waist]:
    """Return the layers, called once, that are given a waist, with its shape and channels.

    Args:
        model: with a graph from its images to its outputs.
        images: normalised, (N, C, H, W).
        grouped: convolutions of several groups may be among the layers.
    """
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.LayerNorm)
        or (isinstance(m, nn.Conv2d) and (m.groups == 1 or grouped))
    ]
    given: dict[str, tuple[Edge | None, Waist]] = {}
    calls: Counter[str] = Counter()

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        if not isinstance(layer, nn.LayerNorm) or _sees_tokens(layer, x):
            given[name] = edge(x), Waist(x.shape, _channel_axis(layer), calls.total())
            calls[name] += 1

    start = images.clone().requires_grad_(True)
    with torch.enable_grad(), eval_mode(model), hooked(layers, see):
        last = edge(model(start))
    if last is None:
        return {}
    graph = _graph(last)
    found: dict[Edge, tuple[str, Waist]] = {}
    for name, (place, waist) in given.items():
        if place is None or place[0] not in graph or place in found or calls[name] > 1:
            continue
        if not _reaches(graph, last, start, place):
            found[place] = name, waist._replace(way=waist.way / calls.total())
    return dict(found.values())


def _graph(last: Edge) -> dict[Node, list[Edge]]:
    """Return what each node of a graph is computed from, and keep the nodes what they are."""
    found: dict[Node, list[Edge]] = {}
    open_nodes = [last[0]]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found[node] = [(before, nr) for before, nr in node.next_functions if before is not None]
            open_nodes += [before for before, _ in found[node]]
    return found


def _reaches(graph: Mapping[Node, list[Edge]], last: Edge, start: Tensor, shut: Edge) -> bool:
    """Whether a path leads from the outputs back to the images that does not pass a tensor."""
    open_nodes = [last[0]] if last != shut else []
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if getattr(node, "variable", None) is start:
            return True
        following = {before[0] for before in graph[node] if before != shut} - seen
        seen |= following
        open_nodes += following
    return False
