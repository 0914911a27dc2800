"""Whether a file does what the model does that it was written from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 1e-3
"""By how much outputs may differ, as a share of the largest: runtimes add in other orders."""


@dataclass(frozen=True)
class Difference:
    """How far outputs are from those that they should be.

    Args:
        images: how many were compared.
        agreement: share of them that are put into the same class.
        max_error: largest difference of an output.
        largest: largest output.
    """

    images: int
    agreement: float
    max_error: float
    largest: float

    @property
    def is_rounding(self) -> bool:
        """Whether they are the same but for rounding; not where one is no number."""
        return self.max_error <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return (
            f"outputs of up to {self.largest:.3g} differ by up to {self.max_error:.3g}, and "
            f"{self.agreement:.1%} of {self.images} images are put into the same class"
        )


def difference(found: Tensor, expected: Tensor) -> Difference:
    """Compare outputs (N, K)."""
    return Difference(
        images=len(expected),
        agreement=float((found.argmax(1) == expected.argmax(1)).float().mean()),
        max_error=float((found - expected).abs().max()),
        largest=float(expected.abs().max()),
    )
