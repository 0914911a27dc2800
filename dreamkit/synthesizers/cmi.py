"""Contrastive Model Inversion: dreams that differ from one another and from those before.

Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation", IJCAI 2021, with
the terms ``bn_feature`` (its form ``paper``, weight 1) and ``adversarial`` (0.5). Unlike the
authors' code, parts are square and not mirrored, parts of earlier images are not compared anew,
and the bank is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.arithmetic import autocast
from dreamkit.errors import TeacherMismatch
from dreamkit.evaluation.features import pooled
from dreamkit.flat_state import below, optimizer_state, prefixed, restore_optimizer
from dreamkit.model_state import inputs_of, seeded
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.synthesizers.dreamer import Best, Session
from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.generative import BETAS, Generative, GenerativeDreamer
from dreamkit.types import BatchPlan, Dream, OnStep, Teacher

EMBEDDING = 256
"""Size of what images are compared by."""


def info_nce(local: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of views against images: each is to find its own.

    Args:
        local: (N, D), unit vectors with gradients.
        others: (M, D), unit vectors; the first N are the views' own images.
        temperature: > 0.
    """
    own = torch.arange(len(local), device=local.device)
    return F.cross_entropy(local @ others.T / temperature, own)


def random_resized_crop(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Return a random part of each image, at the images' size.

    Args:
        images: (N, C, H, W).
        smallest: area of the smallest part, in (0, 1].
        generator: on the CPU.
    """
    area = smallest + (1 - smallest) * torch.rand(len(images), generator=generator)
    side = area.sqrt()
    centre = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (1 - side[:, None])
    affine = torch.zeros(len(images), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = side, side
    affine[:, :, 2] = centre
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class CMIDreamer(GenerativeDreamer):
    """CMI bound to a teacher; it carries the projection and a bank of earlier images' features."""

    def __init__(self, options: CMI, session: Session) -> None:
        super().__init__(options, session)
        self.options = options
        with torch.no_grad():
            blank = torch.zeros(2, *self.shape, device=self.device)
            width = self._features(blank, self.evaluator).shape[1]
        with seeded(derived_seed(session.seed, "projection")):
            head = nn.Sequential(
                nn.Linear(width, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING)
            )
        self.head = head.to(self.device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=options.lr_head)
        self.bank = torch.zeros(0, width, device=self.device)

    def state(self) -> dict[str, Tensor]:
        """Return the projection, its optimizer's momenta, and the bank."""
        state = prefixed("head", self.head.state_dict())
        state |= prefixed("optimizer", optimizer_state(self.head_optimizer))
        return state | {"bank": self.bank}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.head.load_state_dict(below("head", state))
        restore_optimizer(self.head_optimizer, below("optimizer", state))
        self.bank = state["bank"].to(self.device)

    def take_steps(
        self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Train a generator of this batch's own, with its noise."""
        options = self.options
        draws = torch.Generator().manual_seed(plan.seed)
        labels = self.labels(plan.size, draws)
        noise = self.noise(plan.size, draws).requires_grad_()
        views = self.views(steps, draws)
        network = self.new_generator(plan.seed ^ 1)  # other draws than the noise
        optimizer = torch.optim.Adam([*network.parameters(), noise], lr=options.lr, betas=BETAS)
        best = Best(torch.zeros(plan.size, *self.shape, device=self.device))
        for step in range(steps):
            optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            images = self.render(network, noise, evaluator)
            leaf = images.detach().requires_grad_()
            contrast = options.contrast * self._contrast(leaf, draws, evaluator)
            contrast.backward()
            assert leaf.grad is not None
            found = evaluator(images, labels, views[step])
            images.backward(found.gradient + leaf.grad)
            total = found.loss + contrast.detach()
            best.offer(images, total, found.terms)
            optimizer.step()
            self.head_optimizer.step()
            on_step(step + 1, {"loss": total, "contrast": contrast.detach(), **found.terms})
            self.on_images(images.detach(), labels)
        best.require_finite(plan)
        with torch.no_grad():
            newest = self._features(best.found, evaluator)
            self.bank = torch.cat([newest, self.bank])[: options.bank]
        return Dream(best.found, labels, float(best.loss))

    def _contrast(self, images: Tensor, draws: torch.Generator, evaluator: Evaluator) -> Tensor:
        """Compare a part of each image with every whole image of the batch and the bank."""
        part = random_resized_crop(images, self.options.smallest_crop, draws)
        local = F.normalize(self.head(self._features(part, evaluator)), dim=1)
        with torch.no_grad():
            known = torch.cat([self._features(images, evaluator), self.bank])
            whole = F.normalize(self.head(known), dim=1)
        return info_nce(local, whole, self.options.temperature)

    def _features(self, images: Tensor, evaluator: Evaluator) -> Tensor:
        """Return the mean of each channel at each BatchNorm's input, image by image (N, F)."""
        layers = batch_norm_layers(self.teacher.model)
        with inputs_of(layers) as tap, autocast(evaluator.precision, self.device):
            self.teacher.model(images)
        found = [pooled(layer, tap.inputs[name]) for name, layer in layers if name in tap.inputs]
        return torch.cat([x.float() for x in found], dim=1)


@dataclass(frozen=True, kw_only=True)
class CMI(Generative):
    """Contrastive Model Inversion: dreams unlike one another (Fang et al., IJCAI 2021).

    Each batch has a generator and noise of its own, trained for ``steps`` steps. Beside the
    inversion's terms, a part of each image must be told by its features from all other images,
    those of earlier batches too: its batches build on one another.

    Args:
        images: how many to dream.
        regularizers: the weighted terms; the paper's are ``bn_feature`` in its form ``paper``
            (1) and ``adversarial`` (0.5), which needs a student in training.
        cross_entropy: weight of the cross-entropy to the labels.
        batch_size: images made together, over which feature statistics are taken.
        steps: generator steps for each batch; its best images are kept.
        latent: size of the generator's noise.
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees; null is an eighth of the
            side (4 at 32×32).
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        lr: Adam's learning rate for the generator and its noise.
        lr_head: Adam's learning rate for the projection of the features.
        contrast: weight of the contrastive term.
        temperature: of the contrastive term.
        smallest_crop: area of the smallest part that is compared, as a share of the image's.
        bank: how many earlier images are compared with.
        engine: how the teacher is computed.
    """

    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 200
    flip: bool = True
    lr: Annotated[float, Field(gt=0)] = 1e-3
    lr_head: Annotated[float, Field(gt=0)] = 1e-3
    contrast: Annotated[float, Field(ge=0)] = 0.8
    temperature: Annotated[float, Field(gt=0)] = 0.1
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.25
    bank: Annotated[int, Field(ge=0)] = 1024

    dreamer: ClassVar[type[GenerativeDreamer]] = CMIDreamer

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that the terms do not fit, or one without BatchNorm to compare at."""
        super().check(teacher)
        if not batch_norm_layers(teacher.model):
            raise TeacherMismatch(
                f"cmi compares images by what BatchNorm layers are given, and {teacher.card.name} "
                "has none; fast_meta and dafl do without"
            )

    @property
    def label_weight(self) -> float:
        """Weight of the cross-entropy to the labels."""
        return self.cross_entropy
