"""How far a student's features are from its teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.model_state import hooked
from dreamkit.training.feature_points import FeaturePoint, patch_grid

_LEAST = 1e-8
"""Variance of a feature that says something, as a share of its mean square; rounding's is less."""


class FeatureDistance:
    """Mean squared difference of features, each as a share of its variance in the teacher.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, at each point. A regressor
    stands between features of different channels, linear and alike at all positions: the paper's
    convolution, of 1×1. It is to put out the teacher's channels, each with mean 0 and variance 1
    over the batch. There is none where what pruning left of a feature are channels of the
    teacher's, or a student has the teacher's layers. An image says far more of a network in its
    features than in its logits: some hundred thousand numbers in place of a thousand. Wang et al.
    ("Compressing Models with Few Samples: Mimicking then Replacing", CVPR 2022) find so with few
    real images.

    Args:
        student: any network that has the points.
        teacher: frozen.
        points: where they are compared.
        regressors: of the points that want one, by name; they are trained with the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        points: Sequence[FeaturePoint],
        regressors: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        self.points = points
        self.regressors = regressors
        self._layers = (
            [(point.name, student.get_submodule(point.layer)) for point in points],
            [(point.name, teacher.get_submodule(point.name)) for point in points],
        )
        self._own: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See what both networks are given at the points, while the block lasts."""
        student, teacher = self._layers
        with (
            hooked(student, lambda name, layer, x: self._own.update({name: x})),
            hooked(teacher, lambda name, layer, x: self._theirs.update({name: x})),
        ):
            yield

    def taken(self) -> Tensor:
        """Return the distance of what was seen last, of shape (), and forget what was seen.

        0 where all is the same, 1 where a student puts out the teacher's mean and nothing else.
        """
        distances = []
        for point in self.points:
            # A student may leave out whole blocks while it is trained (stochastic depth).
            if point.name not in self._own or point.name not in self._theirs:
                continue
            wanted = point.of_teacher(self._theirs[point.name].detach().float())
            own = self._own[point.name].float()
            if point.maps is not None:
                own, wanted = at_one_resolution(own, wanted, point.maps)
            least = _LEAST * wanted.square().mean()
            if point.name in self.regressors:
                # A regressor starts small, and would not reach features of another scale for long.
                own, wanted = self.regressors[point.name](own), _standardised(wanted, least)
                distances.append((own - wanted).square().mean())
                continue
            error = (own - wanted).square().mean()
            spread = wanted.var(correction=0)
            # A feature that is the same everywhere, such as one of a dead layer, says nothing.
            told = spread > least
            distances.append(torch.where(told, error / torch.where(told, spread, 1.0), 0.0))
        self._own.clear()
        self._theirs.clear()
        return torch.stack(distances).mean() if distances else torch.zeros(())


def _standardised(features: Tensor, least: Tensor) -> Tensor:
    """Return features with mean 0 and variance 1 of each channel, 0 where it never varies.

    Args:
        features: (N, C) or (N, C, H, W).
        least: variance below which a channel counts as one that does not.
    """
    over = [axis for axis in range(features.ndim) if axis != 1]
    var, mean = torch.var_mean(features, over, correction=0, keepdim=True)
    told = var > least
    return torch.where(told, (features - mean) * torch.where(told, var, 1.0).rsqrt(), 0.0)


def at_one_resolution(own: Tensor, wanted: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return two features as maps (N, C, H, W) of the smaller height and width of the two.

    Args:
        own: maps, or tokens (N, L, C) of a square of patches.
        wanted: likewise.
        axes: of the channels of each.
    """
    maps = [_as_map(feature, axis) for feature, axis in zip((own, wanted), axes, strict=True)]
    height, width = (min(map_.shape[axis] for map_ in maps) for axis in (2, 3))
    first, second = (
        map_ if map_.shape[2:] == (height, width) else F.adaptive_avg_pool2d(map_, (height, width))
        for map_ in maps
    )
    return first, second


def _as_map(feature: Tensor, axis: int) -> Tensor:
    if feature.ndim == 3:
        found = patch_grid(feature.shape[1])
        assert found is not None  # or it were no point
        side, before = found
        feature = feature[:, before:].unflatten(1, (side, side))
    return feature if axis == 1 else feature.movedim(-1, 1)


def regressors_of(points: Sequence[FeaturePoint]) -> nn.ModuleDict:
    """Return an untrained regressor for each point that wants one.

    By the point's number among all: its name has dots in it, which such a dictionary refuses.
    """
    made = nn.ModuleDict()
    for number, point in enumerate(points):
        if point.widths is not None:
            given, wanted = point.widths
            linear = point.axis == -1
            made[str(number)] = nn.Linear(given, wanted) if linear else nn.Conv2d(given, wanted, 1)
    return made
