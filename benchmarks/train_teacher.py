"""Train a network of the ``cifar`` teachers on real images, and write its weights and card.

python benchmarks/train_teacher.py --train cifar10/train --test cifar10/test
python benchmarks/train_teacher.py --torchvision CIFAR100 data --model wrn_40_2 --epochs 100
python benchmarks/train_teacher.py --train cifar10/train --test cifar10/test --quick   # minutes
python benchmarks/train_teacher.py --torchvision CIFAR10 data --classes bird cat deer  # of all

The result is a teacher, read by
``{source: cifar, model: resnet20, weights: runs/teachers/resnet20.safetensors}``.
SGD with Nesterov momentum on random crops and mirror images, a linear warm-up and a cosine. An
interrupted training loses at most one epoch: the same command goes on. Networks without BatchNorm
learn faster by Muon:

python benchmarks/train_teacher.py --train cifar10/train --test cifar10/test --model vit \\
    --optimizer muon --lr 8e-3 --weight-decay 0.05 --label-smoothing 0.1 --patch-dropout 0.5
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from supervised_training import Settings, Training
from torch import Tensor, nn

from dreamkit.arithmetic import resolve_precision
from dreamkit.card import Card
from dreamkit.devices import choose_device
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.latency.processor import processor_name
from dreamkit.sources.folder import Folder
from dreamkit.sources.torchvision import TorchvisionDataset
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.teachers.cifar_networks import NETWORKS, build_network
from dreamkit.training.batches import drawn, in_order
from dreamkit.types import Images, ImageSource, StoredImages
from dreamkit.wording import duration

PACKAGE_FOLDER = Path(__file__).parents[1] / "dreamkit" / "teachers" / "weights"
QUICK_EPOCHS, QUICK_IMAGES = 2, 2048
AT_ONCE = 1024


# --- images -----------------------------------------------------------------------------------


def open_sources(options: argparse.Namespace) -> tuple[ImageSource, ImageSource, tuple[str, ...]]:
    """Return what to train on, what to judge by, and the names of the classes."""
    chosen = None if options.classes is None else tuple(options.classes)
    train: Folder | TorchvisionDataset
    test: ImageSource
    if options.torchvision:
        name, root = options.torchvision
        train, test = (
            TorchvisionDataset(name, root, {"train": part}, chosen) for part in (True, False)
        )
    else:
        train = Folder(str(options.train), classes=chosen)
        test = Folder(str(options.test), classes=chosen)
    names = train.class_names()
    if names is None:
        raise DreamkitError(f"torchvision's {options.torchvision[0]} does not name its classes")
    return train, test, names


def read_data(options: argparse.Namespace) -> tuple[StoredImages, StoredImages, Card]:
    """Read all images into memory (CIFAR-10: 150 MB); mean and std are measured."""
    training, testing, names = open_sources(options)
    size = (3, options.size, options.size)
    neutral = Card("data", size, (0.5,) * 3, (0.5,) * 3, len(names), "", class_names=names)
    opened = training.open(neutral)
    train = in_memory(opened, options)
    mean, std = mean_and_std(train.images)
    card = Card(
        name=f"cifar/{options.model}",
        input_size=neutral.input_size,
        mean=mean,
        std=std,
        num_classes=len(names),
        class_names=names,
        origin=f"trained on {options.data}",
    )
    return train, in_memory(testing.open(card), options), card


def in_memory(images: Images, options: argparse.Namespace) -> StoredImages:
    if options.quick:
        images = drawn(images, QUICK_IMAGES, torch.Generator().manual_seed(options.seed))
    stored, labels = zip(*in_order(images, AT_ONCE), strict=True)
    return StoredImages(torch.cat(stored), torch.cat(labels))


def mean_and_std(stored: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation of pixels in [0, 1], to four digits."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in stored.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = float((share * levels).sum())
        means.append(round(mean, 4))
        stds.append(round(math.sqrt(float((share * (levels - mean).square()).sum())), 4))
    return tuple(means), tuple(stds)


# --- training ---------------------------------------------------------------------------------


def train(
    training: Training,
    data: tuple[StoredImages, StoredImages],
    checkpoint: Path,
    every: int,
    console: Console,
) -> float:
    """Train to the last epoch, saving after each; return test accuracy."""
    card, device, epochs = training.card, training.device, training.settings.epochs
    images = StoredImages(data[0].images.to(device), data[0].labels.to(device))
    if checkpoint.is_file():
        training.resume(checkpoint)
        console.print(f"going on after epoch {training.epoch} of {checkpoint}")
    while training.epoch < epochs:
        start = time.perf_counter()
        record = {"loss": training.run_epoch(images, console)}
        if training.epoch % every == 0 or training.epoch == epochs:
            record["test_accuracy"] = accuracy(training.model, data[1], card, device)
        spent = time.perf_counter() - start
        training.seconds += spent
        training.history.append(record)
        training.save(checkpoint)
        left = duration(spent * (epochs - training.epoch))
        said = "".join(f", {key.replace('_', ' ')} {value:.4f}" for key, value in record.items())
        line = f"epoch {training.epoch}/{epochs}{said}, {duration(spent)}, {left} left"
        console.print(line, highlight=False)
    training.model.eval()
    return training.history[-1]["test_accuracy"]


# --- what is written --------------------------------------------------------------------------


def command(arguments: Sequence[str]) -> str:
    """Return how this was run; of absolute paths, which mean nothing elsewhere, the last part."""
    given = (Path(word).name if Path(word).is_absolute() else word for word in arguments)
    return shlex.join(["python", "benchmarks/train_teacher.py", *given])


def notes_of(
    training: Training, tested: StoredImages, compiled: bool, command: str
) -> dict[str, Any]:
    """Return what is worth knowing of how the weights came about."""
    return {
        "test_accuracy": round(training.history[-1]["test_accuracy"], 4),
        "test_images": len(tested),
        **asdict(training.settings),
        "compile": compiled,
        "seconds": round(training.seconds),
        "device": training.device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": command,
    }


def round_weights(model: nn.Module) -> None:
    """Round weights to what float16 holds, in which bundled ones are kept."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def write_teacher(
    folder: Path, stem: str, training: Training, card: Card, dtype: torch.dtype | None = None
) -> Path:
    """Write weights, and the architecture with its card, as ``cifar`` and ``bundled`` read them.

    Args:
        folder: where to.
        stem: of the files' names.
        training: which is over.
        card: of the network.
        dtype: of the weights in the file, None for as they are.
    """
    settings = training.settings
    architecture = {
        "model": settings.model,
        "num_classes": card.num_classes,
        "in_channels": card.input_size[0],
    }
    state = {
        key: value.to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in training.model.state_dict().items()
    }
    path = folder / f"{stem}.safetensors"
    write_atomically(path, safetensors.torch.save(state))
    write_json(folder / f"{stem}.json", {"architecture": architecture, "card": card.to_json()})
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", type=Path, metavar="DIR", help="class folders to train on")
    parser.add_argument("--test", type=Path, metavar="DIR", help="class folders to judge by")
    parser.add_argument("--torchvision", nargs=2, metavar=("DATASET", "ROOT"), help="or one of its")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="of them, these alone")
    parser.add_argument("--data", help="what they are, for the card [the name]")
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="of the images' sides")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="the peak")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument(
        "--optimizer",
        choices=["sgd", "adamw", "muon"],
        default="sgd",
        help="muon for networks without BatchNorm, at a rate of 4e-3 to 8e-3",
    )
    parser.add_argument(
        "--augmentation",
        choices=["plain", "strong"],
        default="plain",
        help="strong: colours and shapes by chance too (TrivialAugment)",
    )
    parser.add_argument("--mixup", type=float, default=0.0, help="and CutMix: their alpha")
    parser.add_argument(
        "--patch-dropout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of a transformer's patches that training leaves out until its last fifth, for speed",
    )
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="takes a minute or two; try it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--evaluate-every", type=int, default=5, metavar="EPOCHS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/teachers"), metavar="FOLDER")
    parser.add_argument(
        "--bundle",
        metavar="NAME",
        help="write into the package's weights too; both are rounded to float16",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs of {QUICK_IMAGES} images"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    options.command = command(sys.argv[1:] if arguments is None else arguments)
    if (options.torchvision is None) == (options.train is None or options.test is None):
        parser.error("give --train and --test, or --torchvision")
    if not 0 <= options.patch_dropout < 1:
        parser.error(f"--patch-dropout is a share from 0 to below 1, not {options.patch_dropout}")
    if options.quick and options.bundle:
        parser.error("--quick trains a worse teacher, which is not for --bundle")
    if options.quick:
        options.epochs = QUICK_EPOCHS
    return options


def run(options: argparse.Namespace) -> None:
    """Read, train and write."""
    console, device = Console(), choose_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data is None:
        folder = "/".join(options.train.resolve().parts[-2:]) if options.train else ""
        options.data = folder or options.torchvision[0]
        if options.classes is not None:
            options.data += f" ({', '.join(options.classes)})"
    console.print("reading images")
    images, tested, card = read_data(options)
    precision = resolve_precision(options.precision, device, build_network(options.model, 2, 3))
    own = {f.name: getattr(options, f.name) for f in fields(Settings) if hasattr(options, f.name)}
    settings = Settings(**own | {"images": len(images), "precision": precision})
    training = Training(settings, card, device, options.compile)
    stem = (
        options.model if options.classes is None else f"{options.model}_{card.num_classes}classes"
    )
    checkpoint = options.out / f"{stem}.unfinished.safetensors"
    train(training, (images, tested), checkpoint, options.evaluate_every, console)
    if options.bundle:
        round_weights(training.model)
        rounded = accuracy(training.model, tested, card, device)
        training.history[-1]["test_accuracy"] = rounded
    notes = notes_of(training, tested, options.compile, options.command)
    card = replace(card, notes=notes)
    written = write_teacher(options.out, stem, training, card)
    if options.bundle:
        card = replace(card, name=f"bundled/{options.bundle}")
        written = write_teacher(PACKAGE_FOLDER, options.bundle, training, card, torch.float16)
    checkpoint.unlink(missing_ok=True)
    if options.json:
        write_json(options.json, notes | {"history": training.history})
    report(notes, written)


def report(notes: dict[str, Any], written: Path) -> None:
    print(f"{written}\n")
    print("| model | images | test accuracy | epochs | seconds | dtype | compiled | threads |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {notes['model']} | {notes['images']} | {notes['test_accuracy']:.4f} "
        f"of {notes['test_images']} | {notes['epochs']} | {notes['seconds']} "
        f"| {notes['precision']} | {notes['compile']} | {notes['threads']} |"
    )
    print(f"\n{notes['processor']}, {notes['device']}, torch {notes['torch']}, {notes['data']}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ninterrupted: finished epochs are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (DreamkitError, OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
