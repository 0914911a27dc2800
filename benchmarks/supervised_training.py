"""Training on labelled images, which can be interrupted: what ``train_teacher.py`` runs.

Everything random in an epoch comes from the seed and the epoch's number, so that a training in two
parts ends where an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from muon import Muon
from rich.console import Console
from rich.progress import track
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import TrivialAugmentWide

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.flat_state import below, optimizer_state, prefixed, restore_optimizer
from dreamkit.model_state import seeded
from dreamkit.stages.batches import batch_seed
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.training.augmentation import drawn_share, random_crop, random_flip
from dreamkit.training.schedule import lr_factor
from dreamkit.types import StoredImages

PADDING, MOMENTUM, WARMUP = 4, 0.9, 0.05
CLIP = 1.0
"""Limit on the gradient's norm with AdamW."""
WHOLE_FROM = 0.8
"""Share of the epochs after which images are shown whole, as they are when the network is used."""
ALIKE = 8
"""Images that are recoloured alike by ``strong`` augmentation."""


@dataclass(frozen=True)
class Settings:
    """What the weights depend on; a training is gone on with under the same ones alone."""

    model: str
    data: str
    images: int
    size: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    optimizer: str
    augmentation: str
    mixup: float
    patch_dropout: float
    precision: str
    seed: int


class Training:
    """A network, its optimizer, and how far it has come."""

    def __init__(
        self, settings: Settings, card: Card, device: torch.device, compiled: bool
    ) -> None:
        self.settings, self.card, self.device = settings, card, device
        with seeded(settings.seed):
            model = build_network(settings.model, card.num_classes, card.input_size[0])
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model) if compiled else self.model
        )
        self.optimizer = optimizer_of(self.model, settings)
        if settings.patch_dropout and not hasattr(model, "patch_drop"):
            raise DreamkitError(f"{settings.model} takes no patches to drop: omit --patch-dropout")
        self.recolour = TrivialAugmentWide() if settings.augmentation == "strong" else None
        self.epoch = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    def run_epoch(self, images: StoredImages, console: Console) -> float:
        """Train for one epoch on images that lie on the device; return the mean loss.

        Raises:
            DreamkitError: the loss is not finite any more.
        """
        settings, seed = self.settings, batch_seed(self.settings.seed, self.epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).to(self.device)
        # Whole batches alone: one shape for the compiler, and others are left out next time.
        steps = max(1, len(images) // settings.batch_size)
        total = steps * settings.epochs
        shown = track(
            order.split(settings.batch_size)[:steps],
            f"epoch {self.epoch + 1}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        losses = []
        self.model.train()
        if settings.patch_dropout:
            whole = self.epoch >= WHOLE_FROM * settings.epochs
            self.model.patch_drop = nn.Identity() if whole else PatchDropout(settings.patch_dropout)
        with seeded(seed):  # dropout
            for step, chosen in enumerate(shown, start=self.epoch * steps):
                for group in self.optimizer.param_groups:
                    factor = lr_factor(step, total, round(WARMUP * total), "cosine")
                    group["lr"] = settings.lr * factor
                x = random_flip(random_crop(images.images[chosen], PADDING, generator), generator)
                if self.recolour is not None:  # several images at a time, as drawing takes time
                    x = torch.cat([self.recolour(few) for few in x.split(ALIKE)])
                losses.append(self._step(self.card.normalise(x), images.labels[chosen], generator))
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise DreamkitError(f"the loss is {loss} in epoch {self.epoch + 1}: lower --lr")
        self.epoch += 1
        return loss

    def _step(self, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        low = self.settings.precision == "bfloat16"
        wanted = F.one_hot(labels, self.card.num_classes).float()
        if self.settings.mixup:
            x, wanted = mixed(x, wanted, self.settings.mixup, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            logits = self.forward(x)
        loss = F.cross_entropy(
            logits.float(), wanted, label_smoothing=self.settings.label_smoothing
        )
        self.optimizer.zero_grad()
        loss.backward()
        if self.settings.optimizer == "adamw":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything that the next epoch needs into one file, whole or not at all."""
        tensors = {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= prefixed("optimizer", optimizer_state(self.optimizer))
        progress = {
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
        }
        write_checkpoint(path, tensors, progress)

    def resume(self, path: Path) -> None:
        """Go on where ``save`` was called.

        Raises:
            DreamkitError: the file is of a training with other settings.
        """
        found = read_checkpoint(path)
        if found is None:
            return
        tensors, progress = found
        theirs, ours = progress["settings"], asdict(self.settings)
        other = [f"{k} {theirs.get(k)}, not {v}" for k, v in ours.items() if theirs.get(k) != v]
        if other:
            raise DreamkitError(
                f"{path} is of a training that was not finished, with {'; '.join(other)}: "
                "give its settings to go on, delete it, or choose another --out"
            )
        state = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        self.model.load_state_dict(state)
        restore_optimizer(self.optimizer, below("optimizer", tensors))
        self.epoch, self.seconds = progress["epoch"], progress["seconds"]
        self.history = progress["history"]


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or Muon or AdamW, which decay no biases and norms."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=MOMENTUM,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
    parameters = list(model.parameters())
    if settings.optimizer == "muon":
        return Muon(parameters, settings.lr, settings.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def mixed(
    x: Tensor, wanted: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself, by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), in turn.

    Args:
        x: images (N, C, H, W).
        wanted: what is wanted of each class (N, K).
        alpha: of Beta(α, α), by which the share is drawn.
        generator: of all draws.
    """
    share = drawn_share(alpha, generator)
    order = torch.randperm(len(x), generator=generator)
    if int(torch.randint(2, (), generator=generator)):
        height, width = x.shape[2:]
        sides = [round(side * math.sqrt(1 - share)) for side in (height, width)]
        top, left = (
            int(torch.randint(whole - part + 1, (), generator=generator))
            for whole, part in zip((height, width), sides, strict=True)
        )
        x = x.clone()
        place = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
        x[place] = x[order][place]
        share = 1 - sides[0] * sides[1] / (height * width)
    else:
        x = share * x + (1 - share) * x[order]
    return x, share * wanted + (1 - share) * wanted[order]
