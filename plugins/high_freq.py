"""A plugin in a single file: a regularizer against fast changes from row to row.

A recipe names the file and uses the entry (the path is relative to the working directory):

    plugins: [plugins/high_freq.py]
    synthesis:
      regularizers:
        - {name: high_freq, weight: 1.0e-3}
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamkit.plugin import InversionStep, Register, Regularizer, hookimpl


@dataclass(frozen=True)
class HighFreq(Regularizer):
    """Mean squared vertical second difference of the images."""

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the term, >= 0, of shape (); images need three rows."""
        x = step.images
        return (x[..., 2:, :] - 2 * x[..., 1:-1, :] + x[..., :-2, :]).square().mean()


@hookimpl
def register_regularizers(register: Register) -> None:
    """Register ``high_freq``."""
    register("high_freq", HighFreq)
