"""Muon (Jordan et al. 2024): momentum whose directions all have the same length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Of the Newton-Schulz iteration: singular values between 0 and 1 end between 0.7 and 1.2."""
MOMENTUM, BETAS = 0.95, (0.9, 0.95)


class Muon(torch.optim.AdamW):
    """Moves matrices and filters by Muon, and all else (depthwise filters too) by AdamW.

    Matrices move as far as AdamW would move them (Liu et al. 2025, arXiv 2502.16982), so that one
    learning rate serves both. PyTorch's and timm's compute in bfloat16 alone, which processors
    without it emulate at an eighth of the speed; this computes in float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "filter": [], "vector": []}
        for parameter in parameters:
            kinds[_kind(parameter)].append(parameter)
        decays = {"matrix": weight_decay, "filter": weight_decay, "vector": 0.0}
        groups = [
            {"params": kinds[kind], "weight_decay": decay, "by_muon": kind == "matrix"}
            for kind, decay in decays.items()
        ]
        super().__init__(groups, lr=lr, betas=BETAS)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step, and forget the matrices' gradients."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["by_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
                        parameter.grad = None  # AdamW passes by what has none
        super().step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:  # named as AdamW's, which looks at them when a state is loaded
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(mean, MOMENTUM)  # Nesterov's
        matrix = orthogonalised(ahead.flatten(1))
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - lr * decay)
        parameter.sub_(matrix.reshape(parameter.shape), alpha=lr * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return U·Vᵀ of a matrix U·S·Vᵀ (M, N), roughly, by Newton and Schulz's iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _kind(parameter: Tensor) -> str:
    if parameter.ndim < 2:
        return "vector"
    return "filter" if 1 in parameter.shape[:2] else "matrix"  # depthwise filters, tokens
