"""Hints: what the layers of a network put out, against those of the network that it was.

FitNets (Romero et al., ICLR 2015), at every BatchNorm layer and without a regressor: the channels
that pruning left are the teacher's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_LEAST = 1e-6
"""Of a layer's variance: one that puts out a constant is not divided by 0."""


class Hints:
    """The difference between BatchNorm layers of a student and of the teacher it is a part of.

    Args:
        student: pruned from the teacher.
        teacher: whose layers have the same names.
        kept: by layer, which of the teacher's channels the student still has; layers that are not
            named have all.
        weight: of the difference in the loss.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        kept: Mapping[str, Sequence[int]],
        weight: float,
    ) -> None:
        self.weight = weight
        self._networks = (student, teacher)
        self._handles: list[Any] = []
        self._listening = False
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        device = next(student.parameters()).device
        self._channels: dict[str, Tensor | None] = {
            name: torch.tensor(kept[name], device=device) if name in kept else None
            for name, layer in student.named_modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None
        }

    def attach(self) -> None:
        """Begin to see what both networks' layers put out, while ``listening``."""
        for network, seen in zip(self._networks, (self._student, self._teacher), strict=True):
            layers = dict(network.named_modules())
            for name in self._channels:
                self._handles.append(
                    layers[name].register_forward_hook(partial(self._see, seen, name))
                )

    def detach(self) -> None:
        """Leave both networks as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take what the next forward passes put out; others are not listened to."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            self._student.clear()
            self._teacher.clear()

    def _see(
        self, seen: dict[str, Tensor], name: str, layer: nn.Module, inputs: Any, output: Tensor
    ) -> None:
        if self._listening:
            seen[name] = output

    def difference(self) -> Tensor:
        """Return the mean over layers of the squared difference, as a share of their variance.

        Both networks must have seen the same images since ``listening`` began.

        Returns:
            Of shape (), 0 where the student puts out what the teacher does.
        """
        shares = []
        for name, channels in self._channels.items():
            target = self._teacher[name].float()
            if channels is not None:
                target = target[:, channels]
            squares = (self._student[name].float() - target).square().mean()
            shares.append(squares / target.var().clamp_min(_LEAST))
        return torch.stack(shares).mean() if shares else torch.zeros(())
