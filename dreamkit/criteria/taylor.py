"""First-order Taylor importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.criteria.coupled import check_makers
from dreamkit.errors import DreamkitError, NothingToPrune
from dreamkit.model_state import eval_mode
from dreamkit.types import NO_LABEL, ChannelGroup, PruningStep


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor importance of gates after BatchNorm: (Σ gate·∂L/∂gate)².

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. A gate of 1
    multiplies each channel; its gradient is γ·∂L/∂γ + β·∂L/∂β of the BatchNorm before it, or
    w·∂L/∂w + b·∂L/∂b summed over a filter without one. Gates of coupled channels add up, the sum is
    squared for each batch, and the squares are averaged over batches.

    Args:
        loss: ``kl`` is KL(p_T ‖ p_pruned), which needs no labels, with its gradient estimated by
            that of the cross-entropy to one label an image, drawn from the teacher's softmax.
            At first student and teacher are one, the KL is at its minimum and has no gradient,
            but the squared gradients of drawn labels average to its curvature (the Fisher
            information), so the ranking holds from the first step. ``exact_kl`` is the plain
            gradient. ``ce`` is cross-entropy to the images' labels.
        temperature: of both softmaxes, for ``kl`` and ``exact_kl``.
        ema: share of the earlier steps' importances in each step's, a moving average; 0 forgets
            them.
    """

    loss: Literal["kl", "exact_kl", "ce"] = "kl"
    temperature: Annotated[float, Field(gt=0)] = 3.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse groups with no layer to put a gate behind.

        Raises:
            NothingToPrune: there are some.
        """
        check_makers(model, groups, _gated, "layer to put a gate behind", instead="")

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return importances >= 0, one tensor (channels,) for each group."""
        scores = [torch.zeros(group.channels) for group in step.groups]
        kept = [(p, p.grad, p.requires_grad) for p in step.model.parameters()]
        parameters = [p.requires_grad_(True) for p, _, _ in kept]
        batches = 0
        try:
            with eval_mode(step.model):
                for images, labels in step.batches():
                    loss = self._loss(step, images, labels)
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    for score, group in zip(scores, step.groups, strict=True):
                        score += gate_gradients(step.model, group).square()
                    batches += 1
        finally:
            for parameter, before, required in kept:
                parameter.requires_grad_(required)
                parameter.grad = before
        found = [score / max(batches, 1) for score in scores]
        if self.ema == 0 or step.earlier is None:
            return found
        return [
            torch.lerp(new, old, self.ema) for new, old in zip(found, step.earlier, strict=True)
        ]

    def _loss(self, step: PruningStep, images: Tensor, labels: Tensor) -> Tensor:
        logits = step.model(images)
        if self.loss == "ce":
            if int(labels.min()) == NO_LABEL:
                raise DreamkitError("taylor with loss: ce needs images with labels", ("criteria",))
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            target = F.softmax(step.teacher(images) / self.temperature, dim=1)
        if self.loss == "exact_kl":
            log_p = F.log_softmax(logits / self.temperature, dim=1)
            return F.kl_div(log_p, target, reduction="batchmean")
        drawn = torch.multinomial(target.cpu(), 1, generator=step.generator).squeeze(1)
        return F.cross_entropy(logits / self.temperature, drawn.to(logits.device))


def gate_gradients(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return Σ gate·∂L/∂gate over a group's gates, (channels,) on the CPU, from ``.grad`` fields.

    The gates stand after the group's BatchNorm layers, or after its convolutions and linear
    layers where it has none.

    Raises:
        NothingToPrune: the group has no layer to put a gate behind.
    """
    made = [(m, model.get_submodule(m.layer)) for m in group.members if m.axis == "out"]
    norms = nn.modules.batchnorm._NormBase
    gated = [(m, v) for m, v in made if isinstance(v, norms) and isinstance(v.weight, Tensor)]
    if not gated:
        gated = [(m, v) for m, v in made if isinstance(v, nn.Conv2d | nn.Linear)]  # type: ignore[misc]
    if not gated:
        raise NothingToPrune(f"the channel group {group.name} has no layer that makes its channels")
    total = torch.zeros(group.channels)
    for member, layer in gated:
        total.index_add_(0, member.channel, _layer_gates(layer)[member.index])
    return total


def _gated(layer: nn.Module) -> nn.Module | None:
    norm = isinstance(layer, nn.modules.batchnorm._NormBase) and isinstance(layer.weight, Tensor)
    return layer if norm or isinstance(layer, nn.Conv2d | nn.Linear) else None


def _layer_gates(layer: nn.Module) -> Tensor:
    """Return Σ parameter·∂L/∂parameter for each output channel of a layer, on the CPU."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    gates = torch.zeros(len(weight))
    for parameter in (weight, getattr(layer, "bias", None)):
        if isinstance(parameter, Tensor) and parameter.grad is not None:
            gates += (parameter * parameter.grad).detach().reshape(len(weight), -1).sum(1).cpu()
    return gates
