"""What the benchmarks compare with: a plain inversion loop and its settings.

The loop is written from the paper (Yin et al., CVPR 2020, eq. 2 to 4) the way a first version is:
the teacher's weights are not frozen, hooks compute the mean and, of a permuted copy, the variance
of every BatchNorm layer's input, and the loss is read at every step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.stage import Stage

PAPER_IMAGENET: Mapping[str, Any] = {
    "lr": 0.05,
    "tv": 1e-4,
    "l2": 1e-2,
    "bn": 1e-2,
    "jitter": 30,
    "flip": True,
}
"""A plain loop's settings for ImageNet, as the paper's; it has 20,000 steps of them."""


class PlainLoop:
    """One batch of DeepInversion on the pixels themselves.

    Args:
        model: the teacher, in eval mode.
        shape: (N, C, H, W) of the batch.
        classes: how many the teacher knows.
        device: where to work.
        lr: Adam's learning rate.
        tv: weight of total variation.
        l2: weight of the l2 norm.
        bn: weight of R_feature.
        jitter: largest roll.
        seed: of the noise and the rolls.
        frozen: keep gradients from the teacher's weights, the one line that a plain loop lacks.
        labels: (N,), of the batch; by default the classes in turn.
        flip: mirror the batch in half of the steps, as the paper does on ImageNet.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int, int],
        classes: int,
        device: torch.device,
        lr: float = 0.05,
        tv: float = 2.5e-5,
        l2: float = 3e-8,
        bn: float = 10.0,
        jitter: int = 2,
        seed: int = 0,
        frozen: bool = False,
        labels: Tensor | None = None,
        flip: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = model.to(device).requires_grad_(not frozen)
        self.images = torch.randn(shape, generator=generator).to(device).requires_grad_()
        if labels is None:
            labels = torch.arange(shape[0]) % classes
        self.labels = labels.to(device)
        self.optimizer = torch.optim.Adam([self.images], lr=lr)
        self.weights = (tv, l2, bn)
        self.jitter = jitter
        self.flip = flip
        self.random = random.Random(seed)
        self.best = self.images.detach().clone()
        self.best_loss = float("inf")
        self._parts: list[Tensor] = []
        self._hooks = [
            module.register_forward_hook(self._see)
            for module in model.modules()
            if isinstance(module, nn.BatchNorm2d)
        ]

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_mean is not None
        assert module.running_var is not None
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self._parts.append(
            (module.running_var - var).norm(2) + (module.running_mean - mean).norm(2)
        )

    def step(self) -> float:
        """Take one step and return its loss."""
        self._parts.clear()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        shift = [self.random.randint(-self.jitter, self.jitter) for _ in range(2)]
        x = torch.roll(self.images, shifts=shift, dims=(2, 3))
        if self.flip and self.random.random() < 0.5:
            x = x.flip(3)
        classification = F.cross_entropy(self.model(x), self.labels)
        variation = (
            (x[:, :, :, :-1] - x[:, :, :, 1:]).norm()
            + (x[:, :, :-1, :] - x[:, :, 1:, :]).norm()
            + (x[:, :, :-1, :-1] - x[:, :, 1:, 1:]).norm()
            + (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
        )
        tv, l2, bn = self.weights
        features = torch.stack(self._parts).sum()
        loss = classification + tv * variation + l2 * x.norm() + bn * features
        value: float = loss.item()
        if value < self.best_loss:
            self.best_loss = value
            self.best = self.images.detach().clone()
        loss.backward()
        self.optimizer.step()
        return value

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def paper_settings(batch: int, steps: int) -> DeepInversion:
    """Return the plain loop's default settings, for dreamkit: the paper's for CIFAR-10."""
    return DeepInversion(
        images=batch,
        batch_size=batch,
        regularizers=(
            Term("tv", 2.5e-5, TotalVariation()),
            Term("l2", 3e-8, L2Norm()),
            Term("bn_feature", 10.0, BNFeature("paper")),
        ),
        stages=(Stage(steps),),
        lr=0.05,
        betas=(0.9, 0.999),
        schedule="constant",
        jitter=2,
        clip=False,
        parameterisation=Pixels(),
    )
