"""Dreamed images in memory, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import TensorDataset

from dreamkit.api.call_folder import CALL, NETWORK
from dreamkit.api.results import Result
from dreamkit.card import Card
from dreamkit.errors import DreamkitError, StoreError
from dreamkit.report.figures import grid
from dreamkit.report.notebook import as_html
from dreamkit.report.tables import distance_said
from dreamkit.stages.statistics_distance import overall
from dreamkit.store.calibration_sets import Kind, write_calibration_set
from dreamkit.store.dreams import DreamStore, holds_dreams
from dreamkit.store.run_directory import REPORT
from dreamkit.store.source import find_store
from dreamkit.types import StoredImages

_SHARD = 1024
"""Images in a file of saved dreams."""


@dataclass(frozen=True)
class Quality:
    """How good dreams are, by the network that they came from.

    Args:
        teacher_accuracy: how often it sees in them what it was asked to, in [0, 1].
        statistics_distance: how far the feature statistics of a batch are from those that the
            network stores of its training, as a multiple of what as many training images would
            have by chance; mean over layers and batches. 1.0 is as near as those; lower is nearer.
            None where the network has no BatchNorm.
        by_layer: the same, layer by layer.
    """

    teacher_accuracy: float
    statistics_distance: float | None
    by_layer: Mapping[str, float]


@dataclass(frozen=True, repr=False, kw_only=True)
class Dreams(Result):
    """Images that were dreamed out of a network.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, the class that each image is to show.
        teacher_logits: (N, K), what the network says of them.
        card: of the network: its size, mean, std and class names.
        quality: what the network itself thinks of them; ``dreamkit.judge`` asks others.
        interrupted: whether the dreaming was stopped before all images were there.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    card: Card
    quality: Quality
    interrupted: bool = False

    @property
    def stored(self) -> StoredImages:
        """The images as the rooms below take them."""
        return StoredImages(self.images, self.labels, self.teacher_logits)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: slice) -> Dreams:
        if not isinstance(chosen, slice):
            raise TypeError("take a slice of dreams: dreams[:8]; single ones are dreams.images[i]")
        return replace(
            self,
            images=self.images[chosen],
            labels=self.labels[chosen],
            teacher_logits=self.teacher_logits[chosen],
            quality=Quality(_accuracy(self.teacher_logits[chosen], self.labels[chosen]), None, {}),
        )

    def normalised(self) -> Tensor:
        """Return the images as the network takes them: (N, C, H, W) float32."""
        return self.card.normalise(self.images)

    def dataset(self) -> TensorDataset:
        """Return a data set of normalised images and labels, for any training loop."""
        return TensorDataset(self.normalised(), self.labels)

    def show(self) -> Figure:
        """Return a figure of up to 80 of them, a class a column where there are at most ten."""
        if not len(self):
            raise DreamkitError("there are no images to show")
        picture = grid(self.images, self.labels)
        figure = Figure(figsize=(picture.width / 100, picture.height / 100))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        return figure

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        told = self.quality.statistics_distance
        return (
            f"Dreams of {self.card.name}, {self.seconds:.1f} s\n"
            f"  {len(self)} image{'' if len(self) == 1 else 's'} of {channels}x{height}x{width}, "
            f"{len(self.labels.unique())} of {self.teacher_logits.shape[1]} classes\n"
            f"  seen by the teacher as asked: {self.quality.teacher_accuracy:.4f}"
            + (
                ""
                if told is None
                else f"\n  statistics: {distance_said(told, self.quality.by_layer)}"
            )
        )

    def _repr_html_(self) -> str:
        picture = grid(self.images[:80], self.labels[:80]) if len(self) else None
        return as_html("Dreams", self._report(), self.seconds, picture)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save them as a run does; ``load_dreams`` and recipes (``source: dreams``) read them.

        Args:
            folder: new or empty.
            overwrite: take the place of dreams that it holds.

        Returns:
            The folder.

        Raises:
            StoreError: something lies there already.
        """
        folder = Path(folder)
        if overwrite and holds_dreams(folder):
            for batch in DreamStore(folder).shards.values():
                (folder / batch.file).unlink()
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(
                f"{folder} is not empty: choose another folder, or give overwrite=True if it holds "
                "dreams"
            )
        settings = {
            "seed": self.seed,
            "teacher_sha256": self.card.weights_sha256,
            "synthesis": self.settings.get("synthesis"),
            "card": self.card.to_json(),
        }
        store = DreamStore(folder, settings)
        for number, first in enumerate(range(0, len(self), _SHARD)):
            part = self[first : first + _SHARD].stored
            store.write(number, part, 0.0, 0.0, self.quality.by_layer)
        return folder

    def to_folder(self, folder: str | Path, kind: Kind = "imagefolder") -> Path:
        """Write them as other tools read them, with ``normalisation.json`` beside them.

        Args:
            folder: new or empty.
            kind: ``imagefolder``: PNG files, one folder a class, as torchvision's ``ImageFolder``
                reads; ``npy``: ``images.npy``, normalised, and ``labels.npy``; ``tensors``:
                ``dreams.safetensors``.

        Returns:
            The folder.

        Raises:
            DreamkitError: there is no such kind, or the folder is not empty or cannot be written.
        """
        if kind not in get_args(Kind):
            raise DreamkitError(f"kind: should be one of {', '.join(get_args(Kind))} (got {kind})")
        write_calibration_set(self.stored, Path(folder), self.card, kind)
        return Path(folder)


def load_dreams(folder: str | Path) -> Dreams:
    """Read dreams that ``Dreams.save`` or a run wrote, each file verified by its SHA-256.

    Args:
        folder: the dreams' folder, or a run directory.

    Raises:
        StoreError: there are none, or a file is damaged.
        DreamkitError: the dreams do not tell which network they came from.
    """
    place = find_store(Path(folder))
    store = DreamStore(place)
    content = store.open()
    images, labels = content.batch(range(len(content)))
    card = card_of(store, place)
    logits = content.teacher_logits.float()
    right = _accuracy(logits, labels)
    metrics = {"synthesis.images": float(len(images)), "synthesis.teacher_accuracy": right}
    by_layer = store.statistics_distance
    distance = overall(by_layer)
    if distance is not None:
        metrics["synthesis.statistics_distance"] = distance
    return Dreams(
        images=images,
        labels=labels,
        teacher_logits=logits,
        card=card,
        quality=Quality(right, distance, by_layer),
        metrics=metrics,
        history=[],
        notes=list(store.notes),
        failures=[],
        details={},
        settings={
            "teacher": {"source": "checkpoint", "path": "path/to/the_network"},
            "synthesis": store.settings.get("synthesis"),
            "application": {"name": "synthesize"},
        },
        seed=int(store.settings.get("seed", 0)),
        device="cpu",
        seconds=store.seconds,
        versions={},
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return how often the largest logit is the label's; 0 of no images."""
    return float((logits.argmax(1) == labels).float().mean()) if len(labels) else 0.0


def card_of(store: DreamStore, place: Path) -> Card:
    """Return the card that saved dreams have, or that of the run or call whose they are.

    Raises:
        DreamkitError: nobody tells it.
    """
    data: Any = store.settings.get("card")
    for file, key in ((REPORT, "teacher"), (CALL, NETWORK)):
        if data is None and (place.parent / file).is_file():
            data = json.loads((place.parent / file).read_text(encoding="utf-8"))[key]
    if data is None:
        raise DreamkitError(
            f"{place} does not tell the mean and std of the network it came from, as a finished "
            "run and Dreams.save do; in a recipe these dreams can be used all the same"
        )
    return Card.from_json(data)
