"""Fréchet distance between two sets of images at a layer of a network of one's choice.

With μ and Σ the mean and covariance of the features of each set, taken as Gaussians,
d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½) (Dowson and Landau 1982; Heusel et al., NeurIPS 2017,
eq. 6). It is FID only at one layer of one Inception network, which ``evaluation.fidelity`` has.
Few images bias it upwards, the more features the more: compare figures of equal numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError


@dataclass(frozen=True)
class Gaussian:
    """The first two moments of features, in float64 on the CPU.

    Args:
        count: images seen.
        mean: (D,).
        scatter: (D, D), the sum over images of (x - mean)(x - mean)ᵀ.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """Return the moments of features (N, D), N at least 1."""
        x = features.detach().cpu().double()
        mean = x.mean(0)
        centred = x - mean
        return Gaussian(len(x), mean, centred.T @ centred)

    def joined(self, other: Gaussian) -> Gaussian:
        """Return the moments of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return Gaussian(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (D, D); of at least two images."""
        return self.scatter / (self.count - 1)

    @property
    def short(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.count <= len(self.mean)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return d² between two Gaussians, at least 0.

    tr((Σ₁Σ₂)^½) is the sum of the square roots of the eigenvalues of Σ₁^½·Σ₂·Σ₁^½, which is
    symmetric. Rounding leaves about 1e-8 of the largest eigenvalue for each feature.

    Raises:
        DreamkitError: a set of fewer than two images has no covariance.
    """
    if min(first.count, second.count) < 2:
        raise DreamkitError("a Fréchet distance needs at least two images on either side")
    one, two = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(one)
    # Rounding turns zeros, of which few images leave many, into small negative numbers.
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ two @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + one.trace() + two.trace() - 2 * shared
    return max(0.0, float(distance))
