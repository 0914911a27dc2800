"""Where one tensor holds all that a network goes on with, so that a student can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from dreamkit.graph_edges import Edge, edge
from dreamkit.model_state import eval_mode, hooked
from dreamkit.training.difference_statistics import Kept


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
    """

    name: str
    axis: int
    channels: Tensor | None
    own: str | None = None
    widths: tuple[int, int] | None = None

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
    ``feature_points``. Of any other the last waist of each resolution is held against the
    teacher's last of that resolution (FitNets: Romero et al., ICLR 2015): the ends of the stages,
    and what the classifier is given. Where the two have other channels a regressor stands between.

    Args:
        teacher: with a graph from its images to its outputs.
        student: likewise.
        kept: which of the teacher's channels a student has that was made from it; else empty.
        images: normalised, (N, C, H, W), on the device of both.

    Returns:
        In forward order; empty if the two have no resolution in common.
    """
    if kept:
        return feature_points(teacher, student, kept, images)
    theirs, own = _waists(teacher, images), _waists(student, images)
    if own and own.items() <= theirs.items():
        return [_point(name, teacher.get_submodule(name), kept, images.device) for name in own]
    last_of_student = _last_of_each_resolution(student, own)
    found = []
    for resolution, name in _last_of_each_resolution(teacher, theirs).items():
        if resolution in last_of_student:
            axis, layer = resolution[0], last_of_student[resolution]
            widths = own[layer][axis], theirs[name][axis]
            regressed = None if widths[0] == widths[1] else widths
            found.append(FeaturePoint(name, axis, None, layer, regressed))
    return found


def _last_of_each_resolution(
    model: nn.Module, waists: Mapping[str, torch.Size]
) -> dict[tuple[int, ...], str]:
    """Return the last waist of each resolution: the channels' axis, and the other sizes."""
    found: dict[tuple[int, ...], str] = {}
    for name, shape in waists.items():
        axis = _channel_axis(model.get_submodule(name))
        positions = shape[2:] if axis == 1 else shape[1:-1]
        found.pop((axis, *positions), None)  # the order is that of the last ones
        found[axis, *positions] = name
    return found


def feature_points(
    teacher: nn.Module, student: nn.Module, kept: Kept, images: Tensor
) -> list[FeaturePoint]:
    """Return the layers by whose inputs a student can be compared with what it was made from.

    These are convolutions and linear layers whose input is a waist of the network: every path from
    the images to the outputs goes through it. It is what a block with a residual sum around it puts
    out, and what any layer of a plain network does; the inside of a block is not one. So a student
    that has them right has all right, and is free in how it comes to them. (In graphs' terms: the
    node dominates the output.)

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
    for name, shape in given.items():
        point = _point(name, teacher.get_submodule(name), kept, images.device)
        if name in shapes and point.left_of(shape) == shapes[name]:
            found.append(point)
    return found


def _point(name: str, layer: nn.Module, kept: Kept, device: torch.device) -> FeaturePoint:
    axes = kept.get(f"{name}.weight")
    chosen = None if axes is None or axes[1] is None else torch.tensor(axes[1], device=device)
    return FeaturePoint(name, _channel_axis(layer), chosen)


def _channel_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _waists(model: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """Return the layers, called once, that are given a waist, with the shape of it."""
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    ]
    given: dict[str, tuple[Edge | None, torch.Size]] = {}
    calls: Counter[str] = Counter()

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        given[name] = edge(x), x.shape
        calls[name] += 1

    start = images.clone().requires_grad_(True)
    with torch.enable_grad(), eval_mode(model), hooked(layers, see):
        last = edge(model(start))
    if last is None:
        return {}
    graph = _graph(last)
    found: dict[Edge, tuple[str, torch.Size]] = {}
    for name, (place, shape) in given.items():
        if place is None or place[0] not in graph or place in found or calls[name] > 1:
            continue
        if not _reaches(graph, last, start, place):
            found[place] = name, shape
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
