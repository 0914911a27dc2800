"""Train the bundled teachers ``digits*`` on scikit-learn's handwritten digits.

    python benchmarks/train_digits_teacher.py            # rewrites the package's weights and card
    python benchmarks/train_digits_teacher.py --digits 7 # of 0 to 6: ``digits7_resnet8``
    python benchmarks/train_digits_teacher.py --model vit       # without BatchNorm
    python benchmarks/train_digits_teacher.py --model convnext
    python benchmarks/train_digits_teacher.py --quick --folder build/try

Training is adversarial: a network that small shifts do not fool is one whose dreams people
recognise (Santurkar et al., "Image Synthesis with a Single (Robust) Classifier", 2019).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.latency.processor import processor_name
from dreamkit.sources.digits import SIZE, Digits
from dreamkit.teachers.bundled import build_bundled
from dreamkit.training.batches import drawn, in_order

PACKAGE_FOLDER = Path(__file__).parents[1] / "dreamkit" / "teachers" / "weights"
# Mean and standard deviation of the training split's pixels in [0, 1].
MEAN, STD = 0.3056, 0.3760
# Largest shift of an image, as the ℓ2 norm over its pixels in [0, 1].
RADIUS, ATTACK_STEPS = 0.8, 4
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet8": {"depth": 8, "width": 16},
    "vit": {"kind": "vit", "size": 8, "patch": 2, "width": 48, "depth": 4, "heads": 3},
    "convnext": {
        "kind": "convnext",
        "depths": [1, 2, 1, 1],
        "widths": [24, 32, 48, 64],
        "patch": 1,
        "kernel": 3,
    },
}


def adversarial(model: nn.Module, x: Tensor, labels: Tensor, share: float) -> Tensor:
    """Return images moved to where the model errs most (Madry et al. 2018).

    Args:
        share: of RADIUS, how far at most.
    """
    radius = share * RADIUS / STD
    shift = torch.zeros_like(x)
    model.eval()
    for _ in range(ATTACK_STEPS):
        shift.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + shift), labels), [shift])
        unit = gradient / (gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-9)
        shift = (shift + 0.4 * radius * unit).detach()
        length = shift.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        shift = shift * (radius / length.clamp(min=max(radius, 1e-9)))
    model.train()
    return x + shift


def card_of(name: str, digits: int) -> Card:
    """Return the card of a network that is yet to be trained."""
    changed = [] if name == "resnet8" else ["--model", name]
    changed += [] if digits == 10 else ["--digits", str(digits)]
    return Card(
        name=f"bundled/digits{'' if digits == 10 else digits}_{name}",
        input_size=SIZE,
        mean=(MEAN,),
        std=(STD,),
        num_classes=digits,
        class_names=tuple("0123456789")[:digits],
        origin=" ".join(["python", "benchmarks/train_digits_teacher.py", *changed]),
    )


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return Nesterov SGD for a ResNet, AdamW for others."""
    if name == "resnet8":
        return torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def train(name: str, digits: int, epochs: int, seed: int) -> tuple[dict[str, Any], nn.Module, Card]:
    """Train on adversarial images with a cosine: a ResNet by Nesterov SGD, others by AdamW.

    Returns:
        The architecture, the model in eval mode and its card, with its accuracy on held-out images.
    """
    torch.manual_seed(seed)
    card = card_of(name, digits)
    images = Digits("train", tuple(range(digits))).open(card)
    architecture = ARCHITECTURES[name] | {"num_classes": digits, "in_channels": 1}
    model = build_bundled(architecture)
    optimizer = optimizer_of(model, name)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        # A transformer that has to begin with moved images does not learn.
        share = 1.0 if name == "resnet8" else min(1.0, 2 * epoch / epochs)
        for stored, labels in in_order(drawn(images, len(images), generator), 64):
            x = adversarial(model, card.normalise(stored), labels, share)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    held_out = Digits("test", tuple(range(digits))).open(card)
    notes = {
        "data": "scikit-learn's handwritten digits, 70 % of them, stratified",
        "test_accuracy": round(accuracy(model, held_out, card, torch.device("cpu")), 4),
        "test_images": len(held_out),
        "epochs": epochs,
        "seed": seed,
        "adversarial_radius": RADIUS,
        "command": card.origin,
    }
    return architecture, model, replace(card, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=PACKAGE_FOLDER, help="where to write")
    parser.add_argument("--digits", type=int, default=10, help="the first so many, 2 to 10")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="resnet8")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 epochs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if not 2 <= options.digits <= 10:
        parser.error("--digits: 2 to 10")
    if options.quick and options.folder == PACKAGE_FOLDER:
        parser.error("--quick trains a worse teacher: give it a --folder of its own")
    start = time.perf_counter()
    epochs = 5 if options.quick else options.epochs
    architecture, model, card = train(options.model, options.digits, epochs, options.seed)
    seconds = time.perf_counter() - start
    name = card.name.removeprefix("bundled/")
    figures = {"architecture": architecture, "card": card.to_json()}
    options.folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    (options.folder / f"{name}.safetensors").write_bytes(safetensors.torch.save(state))
    (options.folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(card.notes | {"seconds": seconds}, indent=1) + "\n")
    print("| model | held-out accuracy | seconds | processor |\n|---|---|---|---|")
    print(f"| {name} | {card.notes['test_accuracy']:.4f} | {seconds:.0f} | {processor_name()} |")


if __name__ == "__main__":
    main()
