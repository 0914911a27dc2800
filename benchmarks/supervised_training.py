"""Training on labelled images by SGD, which can be interrupted: what ``train_teacher.py`` runs.

Everything random in an epoch comes from the seed and the epoch's number, so that a training in two
parts ends where an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.model_state import seeded
from dreamkit.stages.batches import batch_seed
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.training.augmentation import random_crop, random_flip
from dreamkit.training.schedule import lr_factor
from dreamkit.types import StoredImages

PADDING, MOMENTUM, WARMUP = 4, 0.9, 0.05


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
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=MOMENTUM,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
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
        with seeded(seed):  # dropout
            for step, chosen in enumerate(shown, start=self.epoch * steps):
                for group in self.optimizer.param_groups:
                    factor = lr_factor(step, total, round(WARMUP * total), "cosine")
                    group["lr"] = settings.lr * factor
                x = random_flip(random_crop(images.images[chosen], PADDING, generator), generator)
                losses.append(self._step(self.card.normalise(x), images.labels[chosen]))
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise DreamkitError(f"the loss is {loss} in epoch {self.epoch + 1}: lower --lr")
        self.epoch += 1
        return loss

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        low = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            logits = self.forward(x)
        loss = F.cross_entropy(
            logits.float(), labels, label_smoothing=self.settings.label_smoothing
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything that the next epoch needs into one file, whole or not at all."""
        tensors = {f"model/{key}": value for key, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"momentum/{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
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
        for name, parameter in self.model.named_parameters():
            momentum = torch.empty_like(parameter).copy_(tensors[f"momentum/{name}"])
            self.optimizer.state[parameter]["momentum_buffer"] = momentum.detach()
        self.epoch, self.seconds = progress["epoch"], progress["seconds"]
        self.history = progress["history"]
