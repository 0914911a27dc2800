"""How far the statistics of real images are from those that a network stores of its training.

    python benchmarks/real_statistics.py
    python benchmarks/real_statistics.py --checkpoint resnet20-12fca82f.th --images cifar10/train

Without a checkpoint: the bundled digits teacher and its own training images. With one, a CIFAR
network as of benchmarks/time_to_quality.py, and images in one folder a class, as they are and as
its training had them: each padded by 4 black pixels, cropped and mirrored at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from cifar_10 import cifar_checkpoint
from torch import Tensor
from torch.nn import functional as F

import dreamkit
from dreamkit.model_state import eval_mode
from dreamkit.sources.digits import Digits
from dreamkit.sources.folder import Folder
from dreamkit.stages.statistics_distance import statistics_distance
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.types import Images, Teacher

BATCHES = 8
"""Of each size."""


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, C, 32, 32) cropped from black borders and mirrored half of the time."""
    padded = F.pad(images, (4, 4, 4, 4))
    places = torch.randint(0, 9, (len(images), 2), generator=generator).tolist()
    crops = [x[:, a : a + 32, b : b + 32] for x, (a, b) in zip(padded, places, strict=True)]
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    turned = [x.flip(-1) if m else x for x, m in zip(crops, mirrored.tolist(), strict=True)]
    return torch.stack(turned)


@torch.no_grad()
def distances(teacher: Teacher, batches: Iterator[Tensor]) -> list[dict[str, float]]:
    """Return each batch's multiples of chance by layer, of images (N, C, H, W) uint8."""
    with eval_mode(teacher.model), tapped(teacher.model, each_image=True) as tap:
        return [statistics_distance(tap(teacher.card.normalise(b))[1]) for b in batches]


def show(name: str, teacher: Teacher, images: Images, augment: bool) -> None:
    """Print a row for each batch size."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator).tolist()
    for size in (8, 32, 128):
        firsts = range(0, min(BATCHES * size, len(order) - size + 1), size)

        def batches(size: int = size, firsts: range = firsts) -> Iterator[Tensor]:
            for first in firsts:
                batch, _ = images.batch(order[first : first + size])
                yield augmented(batch, generator) if augment else batch

        found = distances(teacher, batches())
        layers = [mean(batch[layer] for batch in found) for layer in found[0]]
        cells = f"{size} | {mean(layers):.2f} | {min(layers):.2f} to {max(layers):.2f}"
        print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="resnet20-12fca82f.th")
    parser.add_argument("--images", type=Path, help="a folder of images it was trained on")
    options = parser.parse_args()
    print("| images | batch | distance | by layer |\n|---|---|---|---|")
    if options.checkpoint is None:
        digits = dreamkit.load_teacher("bundled:digits_resnet8")
        show("digits, as they are", digits, Digits("train").open(digits.card), augment=False)
        return
    teacher = cifar_checkpoint(options.checkpoint)
    images = Folder(str(options.images), labelled=False).open(teacher.card)
    show("as they are", teacher, images, augment=False)
    show("as in training", teacher, images, augment=True)


if __name__ == "__main__":
    main()
