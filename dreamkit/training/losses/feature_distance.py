"""How far a student's features are from those of the teacher that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dreamkit.model_state import hooked
from dreamkit.training.feature_points import FeaturePoint

_LEAST = 1e-8
"""Variance of a feature that says something, as a share of its mean square; rounding's is less."""


class FeatureDistance:
    """Mean squared difference of features, each as a share of its variance in the teacher.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, for every block, and
    without a regressor, as what pruning left of a feature are channels of the teacher's. An image
    says far more of a network in its features than in its logits: some hundred thousand numbers in
    place of a thousand. Wang et al. ("Compressing Models with Few Samples: Mimicking then
    Replacing", CVPR 2022) find so with few real images.

    Args:
        student: made from the teacher.
        teacher: frozen.
        points: where they are compared.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, points: Sequence[FeaturePoint]
    ) -> None:
        self.points = points
        self._layers = [
            [(point.name, network.get_submodule(point.name)) for point in points]
            for network in (student, teacher)
        ]
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
            error = (self._own[point.name].float() - wanted).square().mean()
            spread = wanted.var(correction=0)
            # A feature that is the same everywhere, such as one of a dead layer, says nothing.
            told = spread > _LEAST * wanted.square().mean()
            distances.append(torch.where(told, error / torch.where(told, spread, 1.0), 0.0))
        self._own.clear()
        self._theirs.clear()
        return torch.stack(distances).mean() if distances else torch.zeros(())
