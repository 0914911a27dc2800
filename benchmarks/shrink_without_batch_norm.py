"""Networks without BatchNorm made smaller without data: INT8, fewer channels, fewer weights.

The bundled ones for CIFAR-10, on their own dreams, on uniform noise and on real images. Accuracies
are of all test images; ``int8`` has weights and activations in 8 bits, calibrated on the images.
Needs the extra ``onnx``.

    python benchmarks/shrink_without_batch_norm.py --train cifar10/train --test cifar10/test
    python benchmarks/shrink_without_batch_norm.py ... --teachers cifar10_vit --only int8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dreamkit
from dreamkit.latency.processor import processor_name
from dreamkit.sources.folder import Folder
from dreamkit.store.atomic import write_json
from dreamkit.training.batches import drawn
from dreamkit.types import Teacher

TEACHERS = ("cifar10_vit", "cifar10_convnext")
GIVEN = tuple[Tensor, Tensor]
"""Images (N, 3, H, W) uint8, and their labels (N,)."""


def dreams(teacher: Teacher, options: argparse.Namespace) -> GIVEN:
    """Return what ``deepinversion`` makes of the teacher by its defaults."""
    found = dreamkit.invert(
        teacher,
        options.images,
        steps=options.steps,
        batch_size=min(256, options.images),
        flip=True,
        seed=options.seed,
    )
    return found.images, found.labels


def noise(teacher: Teacher, options: argparse.Namespace) -> GIVEN:
    """Return uniform noise, labelled by chance."""
    draw = torch.Generator().manual_seed(options.seed)
    shape = (options.images, *teacher.card.input_size)
    images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    return images, torch.randint(0, teacher.card.num_classes, (options.images,), generator=draw)


def real(teacher: Teacher, options: argparse.Namespace) -> GIVEN:
    """Return training images."""
    images = Folder(options.train).open(teacher.card)
    some = drawn(images, options.images, torch.Generator().manual_seed(options.seed))
    return some.batch(range(len(some)))


def int8(teacher: Teacher, images: GIVEN, options: argparse.Namespace) -> Mapping[str, float]:
    """Return what a file with weights and activations of 8 bits knows."""
    made = dreamkit.quantize(
        teacher, images, evaluation=options.test, latency_batches=[1], max_disagreement=1
    )
    return {"int8": made.metrics["int8.accuracy"], "agreement": made.metrics["int8.agreement"]}


def dynamic(teacher: Teacher, images: GIVEN, options: argparse.Namespace) -> Mapping[str, float]:
    """Return what a file knows whose linear layers alone are in 8 bits, ranged as images pass."""
    made = dreamkit.quantize(
        teacher,
        images,
        quantizer="onnxruntime_dynamic",
        evaluation=options.test,
        latency_batches=[1],
        max_disagreement=1,
    )
    return {"dynamic int8": made.metrics["int8.accuracy"]}


def pruned(teacher: Teacher, images: GIVEN, options: argparse.Namespace) -> Mapping[str, float]:
    """Return what is known at a share of the FLOPs, untrained and after the recovery."""
    made = dreamkit.prune(
        teacher,
        images,
        flops=options.flops,
        evaluation=options.test,
        batch_size=min(128, options.images),
        recovery=_lessons(options),
    )
    return {
        "pruned": made.metrics["pruned.accuracy"],
        "after recovery": made.metrics["student.accuracy"],
        "of the FLOPs": made.metrics["student.flops"] / made.metrics["teacher.flops"],
    }


def sparse(teacher: Teacher, images: GIVEN, options: argparse.Namespace) -> Mapping[str, float]:
    """Return what is known with a share of the weights at zero, untrained and recovered."""
    made = dreamkit.recover(
        teacher, images, sparsity=options.sparsity, evaluation=options.test, **_lessons(options)
    )
    return {
        "sparse": made.metrics["pruned.accuracy"],
        "after recovery": made.metrics["student.accuracy"],
    }


def _lessons(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "steps": options.lessons,
        "batch_size": min(128, options.images),
        "augmentation": {"crop": 4, "flip": True},
    }


IMAGES: dict[str, Callable[[Teacher, argparse.Namespace], GIVEN]] = {
    "dreams": dreams,
    "noise": noise,
    "real images": real,
}
WAYS: dict[str, Callable[[Teacher, GIVEN, argparse.Namespace], Mapping[str, float]]] = {
    "int8": int8,
    "dynamic": dynamic,
    "pruned": pruned,
    "sparse": sparse,
}


def main() -> None:
    """Print a line for each teacher, kind of images and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--train", required=True, metavar="DIR", help="class folders")
    parser.add_argument("--test", required=True, metavar="DIR", help="class folders to judge by")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--on", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--images", type=int, default=1024, help="of each kind")
    parser.add_argument("--steps", type=int, default=100, help="of dreaming")
    parser.add_argument("--lessons", type=int, default=200, help="steps of recovery")
    parser.add_argument("--flops", type=float, default=0.6, help="share that is left")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the mechanics: few images, few steps")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.quick:
        options.images, options.steps, options.lessons = 32, 2, 2
    print("| teacher | on | figures |\n|---|---|---|")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.teachers:
        teacher = dreamkit.load_teacher(f"bundled:{name}")
        for kind in options.on:
            images = IMAGES[kind](teacher, options)
            for way in options.only:
                figures = dict(WAYS[way](teacher, images, options))
                found.setdefault(name, {}).setdefault(kind, {})
                found[name][kind] |= {f"{way}: {key}": value for key, value in figures.items()}
                said = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
                print(f"| {name} | {kind} | {said} |", flush=True)
    print(f"\n{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
