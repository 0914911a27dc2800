"""Checks of losses: of dreaming, of learning new classes, of distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreamkit.plugin.testing.tiny import (
    CLASSES,
    SIZE,
    check_gradient,
    check_scalar,
    expect,
    made,
    working,
)
from dreamkit.types import (
    DistillationLoss,
    Heads,
    IncrementalLoss,
    IncrementalStep,
    InversionStep,
    LayerStatistics,
    NormMeans,
    Regularizer,
)

_BATCH = 6


def check_regularizer(entry: Regularizer | type) -> None:
    """Check a regularizer: a finite scalar whose gradient reaches the images.

    Of what ``needs`` does not declare, the step has nothing.

    Raises:
        ContractError: it is not.
    """
    regularizer, name = made("regularizers", entry)
    step = _inversion_step(regularizer.needs)
    before = step.images.detach().clone()
    with working(f"{name} on a step with what its 'needs' declares ({_listed(regularizer)})"):
        value = regularizer(step)
    check_scalar(value, name)
    check_gradient(value, step.images, name, "the images")
    expect(torch.equal(step.images, before), f"{name} changes the images in place")


def check_incremental_loss(entry: IncrementalLoss | type) -> None:
    """Check a loss of learning new classes: a finite scalar whose gradient reaches the network.

    Unless ``needs`` declares ``replay``, there are no images of old classes; unless it declares
    ``head``, no last layers.

    Raises:
        ContractError: it is not.
    """
    loss, name = made("losses", entry)
    draws = torch.Generator().manual_seed(0)
    old, classes = CLASSES, CLASSES + 2
    logits = _logits(classes, draws).requires_grad_()
    labels = torch.arange(_BATCH) % 2 + old
    step, sources = IncrementalStep(logits, _logits(old, draws), labels), [logits]
    if "replay" in loss.needs:
        replayed = _logits(classes, draws).requires_grad_()
        step = replace(
            step,
            replay_logits=replayed,
            replay_old_logits=_logits(old, draws),
            replay_labels=torch.arange(_BATCH) % old,
        )
        sources.append(replayed)
    if "head" in loss.needs:
        inputs, weights = _features(len(sources) * _BATCH, draws), _features(classes, draws)
        sources += [inputs.requires_grad_(), weights.requires_grad_()]
        was, before = weights.detach()[:old], _features(len(inputs), draws)
        step = replace(
            step, head=Heads(inputs, before, lambda x: x @ weights.T, lambda x: x @ was.T)
        )
    with working(f"{name} on a step with what its 'needs' declares ({_listed(loss)})"):
        value = loss(step)
    check_scalar(value, name)
    expect(value.requires_grad, f"no gradient of {name} reaches the logits")
    found = torch.autograd.grad(value, sources, allow_unused=True)
    finite = [gradient.isfinite().all() for gradient in found if gradient is not None]
    expect(bool(finite), f"no gradient of {name} reaches the logits")
    expect(all(finite), f"the gradient of {name} in the logits is not finite")


def check_distillation_loss(entry: DistillationLoss | type) -> None:
    """Check a distillation loss: a finite scalar whose gradient reaches the student.

    Raises:
        ContractError: it is not.
    """
    loss, name = made("distillation_losses", entry)
    draws = torch.Generator().manual_seed(0)
    for temperature in (1.0, 4.0):
        student, teacher = _logits(CLASSES, draws).requires_grad_(), _logits(CLASSES, draws)
        with working(f"{name} at temperature {temperature}"):
            value = loss(student, teacher, temperature)
        check_scalar(value, name)
        check_gradient(value, student, name, "the student's logits")


def _inversion_step(needs: frozenset[str]) -> InversionStep:
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, *SIZE, generator=draws).requires_grad_()
    flat = images.flatten(1)
    # All of a step depends on the images, as in a run.
    to_logits = [torch.randn(flat.shape[1], CLASSES, generator=draws) / 8 for _ in range(2)]
    features = torch.randn(flat.shape[1], 5, generator=draws) / 8
    patches = images.flatten(2).transpose(1, 2)
    seen = LayerStatistics(
        "bn1",
        images.mean((0, 2, 3)),
        images.var((0, 2, 3), correction=0),
        torch.zeros(SIZE[0]),
        torch.ones(SIZE[0]),
    )
    norm = NormMeans("norm1", patches.mean((0, 1)), torch.ones(SIZE[0]))
    return InversionStep(
        images,
        torch.arange(_BATCH) % CLASSES,
        flat @ to_logits[0],
        flat @ to_logits[1] if "student_logits" in needs else None,
        (seen, replace(seen, name="bn2")) if "bn_statistics" in needs else (),
        flat @ features if "features" in needs else None,
        (patches, patches.square()) if "block_outputs" in needs else (),
        (norm, replace(norm, name="norm2")) if "norm_means" in needs else (),
    )


def _logits(classes: int, draws: torch.Generator) -> Tensor:
    return torch.randn(_BATCH, classes, generator=draws)


def _features(rows: int, draws: torch.Generator) -> Tensor:
    return torch.randn(rows, 5, generator=draws)


def _listed(entry: Any) -> str:
    return ", ".join(sorted(entry.needs)) or "nothing"
