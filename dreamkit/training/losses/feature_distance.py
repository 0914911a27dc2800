"""How far a student's features are from its teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dreamkit.model_state import hooked
from dreamkit.training.feature_points import FeaturePoint

_LEAST = 1e-8
"""Variance of a feature that says something, as a share of its mean square; rounding's is less."""


class FeatureDistance:
    """Mean squared difference of features, each as a share of its variance in the teacher.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, at each point. A regressor
    stands between features of different channels, linear and alike at all positions: the paper's
    convolution, of 1×1. There is none where what pruning left of a feature are channels of the
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
            if point.name in self.regressors:
                own = self.regressors[point.name](own)
            error = (own - wanted).square().mean()
            spread = wanted.var(correction=0)
            # A feature that is the same everywhere, such as one of a dead layer, says nothing.
            told = spread > _LEAST * wanted.square().mean()
            distances.append(torch.where(told, error / torch.where(told, spread, 1.0), 0.0))
        self._own.clear()
        self._theirs.clear()
        return torch.stack(distances).mean() if distances else torch.zeros(())


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
