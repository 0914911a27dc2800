"""Tables 4 and 5 of DeepInversion on a network for ImageNet, row by row, beside Torch-Pruning.

    python benchmarks/tables4_5_imagenet.py --teacher NETWORK --photos PHOTOS \\
        --images deepinversion=runs/dreams adi=runs/prune_efficientnet_lite0 unconditional=runs/free
    python benchmarks/tables4_5_imagenet.py ... --rows none noise --shares 0.8
    python benchmarks/tables4_5_imagenet.py ... --rows torch_pruning_real --rival FOLDER
    python benchmarks/tables4_5_imagenet.py --smoke    # random weights: the mechanics, a minute

A cell is a row at a share of the FLOPs. Each leaves a JSON file under --out; finished ones are
read, interrupted ones go on, and the table has those that there are. Half of the photographs,
drawn, are images without labels to train on; accuracy and agreement are measured on the other half.
A row is pruned and recovers as recipes/imagenet/prune_efficientnet_lite0.yaml does, on images that
are there; rows but those with HA rank by Taylor importance alone. "unconditional" are dreams of no
class (not the paper's). "none" looks at no image at all: the norm of the filters, and BatchNorm's
statistics as they were. Images are a run's folder, that of
its dreams, class folders, or a .pt file of (uint8 images, labels). --rival names a folder with
Torch-Pruning (see torch_pruning_rival.py): what it leaves takes the same statistics, and recovers
in the same loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from given import NETWORK, given_network
from recipe_runs import RECIPES
from torch import Tensor, nn

import dreamkit
from dreamkit.allocator import freed_memory_kept
from dreamkit.api.given_images import as_images
from dreamkit.applications.prune import Prune
from dreamkit.card import Card
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.accuracy import accuracy, agreement
from dreamkit.evaluation.cost import count
from dreamkit.latency.onnx_runtime import OnnxRuntime
from dreamkit.latency.processor import processor_name
from dreamkit.latency.torch_eager import TorchCPU
from dreamkit.plugins import build_registries
from dreamkit.recipe import build_entry, read_recipe
from dreamkit.report.run_log import MemoryLog
from dreamkit.stages.measuring import time_models
from dreamkit.stages.samples import parted
from dreamkit.stages.statistics import give_statistics
from dreamkit.stages.teaching import train_student
from dreamkit.store.atomic import write_json
from dreamkit.training.difference_statistics import stating
from dreamkit.types import NO_LABEL, RunContext, StoredImages, Teacher

RECIPE = RECIPES / "imagenet" / "prune_efficientnet_lite0.yaml"
SHARES = (0.8, 0.63)
DREAMED = ("deepinversion", "unconditional", "adi")
PAPER_4 = {
    # Yin et al., CVPR 2020, Table 4: ResNet-50, top-1 of 76.1 at 63 % of the FLOPs.
    "none": 16.6,
    "real": 74.9,  # 100,000 images
    "deepinversion": 72.0,
    "adi": 73.3,
}
PAPER_5 = {
    # Table 5, at 80 % of the filters: top-1, GFLOPs and ms of 4.1 and 4.90.
    "adi": "73.3, 2.7, 4.36",
    "deepinversion_adi_ha": "74.0, 2.9, 4.22",
}
TAYLOR = [{"name": "taylor", "weight": 1}]
RIVAL = "torch_pruning_"
"""Begins the rows of Torch-Pruning; what follows are its images."""
ROWS = (
    *("none", "real", "noise", *DREAMED, "deepinversion_adi_ha"),
    *(RIVAL + images for images in ("real", "deepinversion")),
)


def say(text: str) -> None:
    """Tell something on the way."""
    print(text, file=sys.stderr, flush=True)


def joined(*sets: StoredImages) -> StoredImages:
    """Return the images of several sets as one."""
    return StoredImages(
        torch.cat([images.images for images in sets]), torch.cat([s.labels for s in sets])
    )


def noise(card: Card, images: int, seed: int) -> StoredImages:
    """Return images of which each normalised value is drawn from N(0, 1)."""
    drawn = torch.randn(images, *card.input_size, generator=torch.Generator().manual_seed(seed))
    return StoredImages(card.to_stored(drawn), torch.full((images,), NO_LABEL))


def read_images(path: Path, card: Card) -> StoredImages:
    """Return the images of a run, of a folder of dreams or of class folders, or of a file."""
    if path.suffix == ".pt":
        return StoredImages(*torch.load(path, weights_only=True))
    try:
        return dreamkit.load_dreams(path).stored
    except DreamkitError:
        found = as_images(path, card, str(path))
        return StoredImages(*found.batch(range(len(found))))


def kept_channels(student: nn.Module, teacher: nn.Module) -> dict[str, list[list[int] | None]]:
    """Return which of a network's channels the BatchNorm layers of a pruned one have.

    A layer keeps its channels' numbers as they were and in their order, and these tell them.
    """
    theirs = dict(stating(teacher))
    kept: dict[str, list[list[int] | None]] = {}
    for name, layer in stating(student):
        rows, others = _numbers(layer), _numbers(theirs[name])
        found, first = [], 0
        for row in rows:
            same = (others[first:] == row).all(1).nonzero()
            if not len(same):
                raise SystemExit(f"{name}: not a layer that was pruned alone")
            first += int(same[0]) + 1
            found.append(first - 1)
        for of in ("mean", "var"):
            kept[f"{name}.running_{of}"] = [found]
    return kept


def _numbers(layer: nn.Module) -> Tensor:
    """Return what each channel of a BatchNorm layer has, (C, 4)."""
    names = ("weight", "bias", "running_mean", "running_var")
    return torch.stack([getattr(layer, name).detach() for name in names], 1)


@dataclass(frozen=True)
class Cell:
    """A row at a share of the FLOPs."""

    row: str
    share: float

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.row}-{self.share:g}"


class Bench:
    """What all cells have in common.

    Args:
        options: from the command line.
        teacher: that is pruned.
        photos: of which half is trained on without labels.
    """

    def __init__(self, options: argparse.Namespace, teacher: Teacher, photos: StoredImages) -> None:
        self.options = options
        self.teacher = teacher
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(options.seed))
        held, free = order.chunk(2)
        self.held = StoredImages(photos.images[held], photos.labels[held])
        unlabelled = torch.full((len(free),), NO_LABEL)
        self.real = StoredImages(photos.images[free], unlabelled)
        changes = ["evaluation=null", *options.changes, f"seed={options.seed}"]
        recipe = read_recipe(RECIPE, build_registries, options.preset, changes)
        self.application: dict[str, Any] = recipe.root.plain()["application"]
        for name in ("name", "target", "images", "adaptive"):
            self.application.pop(name, None)
        self.told = {
            "teacher": teacher.card.weights_sha256,
            "application": self.application,
            "seed": options.seed,
            "photos": len(photos),
        }

    def images(self, row: str) -> StoredImages:
        """Return what a row is ranked and trained on."""
        row = row.removeprefix(RIVAL)
        if row == "real":
            return self.real
        if row in {"none", "noise"}:
            return noise(self.teacher.card, len(self.real), self.options.seed)
        if row == "deepinversion_adi_ha":
            return joined(self.images("deepinversion"), self.images("adi"))
        given = self.options.given.get(row)
        if given is None:
            raise SystemExit(f"{row}: give --images {row}=PATH")
        return read_images(given, self.teacher.card)

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell came to; from its file, where that is there."""
        path: Path = self.options.out / f"{cell.name}.json"
        images = self.images(cell.row)
        told = {**self.told, "row": cell.row, "share": cell.share, "images": len(images)}
        if cell.row.startswith(RIVAL):
            told["importance"] = self.options.importance
        elif cell.row.endswith("_ha"):
            told["latency"] = self.options.latency
        told = json.loads(json.dumps(told))
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["told"] != told:
                raise SystemExit(f"{path} is of other settings or images: delete it, or set --out")
            return found
        say(f"\n{cell.name}: {len(images)} images")
        folder = self.options.out / cell.name
        make = self.by_rival if cell.row.startswith(RIVAL) else self.by_dreamkit
        student, numbers = make(cell, images, folder)
        found = {"told": told, **numbers, **self.measured(student)}
        write_json(path, found)
        return found

    def by_dreamkit(
        self, cell: Cell, images: StoredImages, folder: Path
    ) -> tuple[nn.Module, dict[str, float]]:
        """Prune and recover as ``dreamkit.prune`` does."""
        given = dict(self.application)
        aware = cell.row.endswith("_ha")
        criteria = given.pop("criteria") if aware else TAYLOR
        if cell.row == "none":
            criteria = [{"name": "magnitude", "weight": 1}]
            recovery = {**given["recovery"], "steps": None, "epochs": 0, "statistics": "keep"}
            given |= {"statistics": "keep", "recovery": recovery, "finetune": None}
        given.pop("criteria", None)
        backend = {"name": self.options.latency, "threads": 1} if aware else None
        made = dreamkit.prune(
            self.teacher,
            images,
            flops=cell.share,
            criteria=criteria,
            latency_backend=backend,
            seed=self.options.seed,
            device="cpu",
            progress=True,
            out=folder,
            evaluation=self.held,
            allow_foreign=self.options.allow_foreign,
            **given,
        )
        known = ("pruned.accuracy", "pruned.rounds", "pruning.seconds", "training.seconds")
        return made.model, {name: made.metrics[name] for name in known if name in made.metrics}

    def by_rival(
        self, cell: Cell, images: StoredImages, folder: Path
    ) -> tuple[nn.Module, dict[str, float]]:
        """Let Torch-Pruning prune, and recover as the other rows do."""
        folder.mkdir(parents=True, exist_ok=True)
        fitted = parted(images, self.options.seed, say).fitted  # nor do other rows fit to the rest
        images = StoredImages(*fitted.batch(range(len(fitted))))
        student, numbers = self._left_by_rival(cell, images, folder)
        settings: Prune = build_entry(
            build_registries(),
            "applications",
            {**self.application, "name": "prune", "target": {"flops": cell.share}},
        )
        card, device, log = self.teacher.card, torch.device("cpu"), MemoryLog()
        context = RunContext(self.options.seed, device, folder, log, TorchCPU())
        kept = kept_channels(student, self.teacher.model)
        found = {"cut.accuracy": accuracy(student, self.held, card, device)}
        count = settings.batch_size * settings.statistics_batches
        some = StoredImages(images.images[:count], images.labels[:count])
        how, size = settings.statistics, settings.batch_size
        give_statistics(how, self.teacher, student, kept, some, size, context)
        found["pruned.accuracy"] = accuracy(student, self.held, card, device)
        recovery = settings.recovery
        train_student(self.teacher, student, images, recovery, context, "recovery", kept=kept)
        own = {name: log.metrics[name] for name in ("training.seconds",) if name in log.metrics}
        return student, {**found, **own, "pruning.seconds": numbers["seconds"]}

    def _left_by_rival(
        self, cell: Cell, images: StoredImages, folder: Path
    ) -> tuple[nn.Module, dict[str, float]]:
        out = folder / "torch_pruning.pt"
        if not out.is_file():
            network, shown = folder / "network.pt", folder / "images.pt"
            torch.save(self.teacher.model, network)
            limits, size = self.application["limits"], self.application["batch_size"]
            ranked = images.images[: size * self.application["ranking_batches"]]
            torch.save(self.teacher.card.normalise(ranked), shown)
            script = Path(__file__).with_name("torch_pruning_rival.py")
            command = [sys.executable, script, network, shown, folder / "part.pt"]
            command += ["--flops", cell.share, "--chunk", limits["chunk"], "--batch", size]
            command += ["--most", limits["max_ratio"], "--seed", self.options.seed]
            command += ["--importance", self.options.importance]
            if self.options.smoke:
                command += ["--rounds", 20]
            paths = [str(self.options.rival), *sys.path]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            subprocess.run([str(part) for part in command], check=True, env=environment)
            (folder / "part.pt").rename(out)
            network.unlink()
            shown.unlink()
        found: tuple[nn.Module, dict[str, float]] = torch.load(out, weights_only=False)
        return found

    def measured(self, student: nn.Module) -> dict[str, float]:
        """Return what a network is and takes, beside the teacher's."""
        card, device = self.teacher.card, torch.device("cpu")
        student.eval()
        networks = {"student": student, "teacher": self.teacher.model}
        found: dict[str, float] = {}
        for name, model in networks.items():
            found[f"{name}.accuracy"] = accuracy(model, self.held, card, device)
            cost = count(model, card.input_size)
            found |= {f"{name}.flops": cost.flops, f"{name}.params": cost.params}
        found["student.agreement"] = agreement(student, self.teacher.model, self.held, card, device)
        plain = {name: copied(model) for name, model in networks.items()}
        for model in plain.values():
            model.to(memory_format=torch.contiguous_format)
        repeats = 3 if self.options.smoke else 15
        backends = {
            "torch": TorchCPU(threads=1, repeats=repeats),
            "onnxruntime": OnnxRuntime(threads=1, repeats=repeats),
        }
        for backend, timed in backends.items():
            sized = {name: (model, card.input_size) for name, model in plain.items()}
            timings = time_models(sized, timed, say)
            found |= {f"{name}.{backend}_ms": t.median_ms for name, t in timings.items()}
        return found


def table(cells: Mapping[tuple[str, float], Mapping[str, Any]], shares: list[float]) -> str:
    """Return the table of the cells that there are, as Markdown."""
    head = ["row", "images"]
    for share in shares:
        at = f"{share:.0%}: "
        head += [at + "untrained", "accuracy", "of its teacher's", "agreement", "GFLOPs"]
        head += ["torch, ms (of teacher's)", "ONNX Runtime, ms (of teacher's)"]
    head += ["paper, 63 %: top-1", "paper, Table 5: top-1, GFLOPs, ms"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in ROWS:
        found = [cells.get((row, share)) for share in shares]
        there = [cell for cell in found if cell is not None]
        if not there:
            continue
        images = "-" if row == "none" else str(there[0]["told"]["images"])
        shown = [row, images]
        for cell in found:
            shown += ["" for _ in range(7)] if cell is None else _figures(cell)
        shown += [str(PAPER_4.get(row, "")), PAPER_5.get(row, "")]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _figures(cell: Mapping[str, Any]) -> list[str]:
    accuracy, whole = cell["student.accuracy"], cell["teacher.accuracy"]
    untrained = cell.get("pruned.accuracy")
    shown = [
        "" if untrained is None else f"{untrained:.3f}",
        f"{accuracy:.3f}",
        f"{accuracy / whole:.3f}" if whole else "",
        f"{cell['student.agreement']:.3f}",
        f"{cell['student.flops'] / 1e9:.3f}",
    ]
    for backend in ("torch", "onnxruntime"):
        ms, teacher_ms = cell[f"student.{backend}_ms"], cell[f"teacher.{backend}_ms"]
        shown.append(f"{ms:.2f} ({ms / teacher_ms:.2f})")
    return shown


def smoke(options: argparse.Namespace) -> tuple[Teacher, StoredImages]:
    """Return a small network of random weights, and noise in place of photographs and dreams."""
    named = dreamkit.load_teacher("timm:test_efficientnet", None)
    card = dataclasses.replace(named.card, input_size=(3, 64, 64))
    options.out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(DREAMED, 1):
        stored = noise(card, 24, number)
        file = options.out / f"{name}.pt"
        torch.save((stored.images, stored.labels), file)
        options.given.setdefault(name, file)
    images = noise(card, 32, 0).images
    return dataclasses.replace(named, card=card), StoredImages(images, torch.arange(32))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", help=NETWORK)
    parser.add_argument("--photos", type=Path, help="class folders, or .pt of (images, labels)")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="ROW=PATH", help=f"of {', '.join(DREAMED)}"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--rival", type=Path, help="folder with torch_pruning")
    parser.add_argument("--importance", choices=["taylor", "magnitude"], default="taylor")
    parser.add_argument("--latency", default="torch-cpu", help="backend of the rows with HA")
    parser.add_argument("--preset", help="of the recipe")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="PATH=VALUE")
    parser.add_argument("--allow-foreign", action="store_true", help="dreams of another network")
    parser.add_argument("--out", type=Path, default=Path("runs/tables4_5_imagenet"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="random weights: the mechanics")
    options = parser.parse_args()
    options.given = {}
    for text in options.images:
        name, _, path = text.partition("=")
        if name not in DREAMED or not path:
            parser.error(f"--images: ROW=PATH with a row of {', '.join(DREAMED)}, not {text}")
        options.given[name] = Path(path)
    if options.smoke:
        options.preset, options.shares = "smoke", options.shares[:1]
        options.rows = options.rows or ["none", "noise", "deepinversion_adi_ha"]
        options.out = options.out.with_name(f"{options.out.name}-smoke")
    elif options.teacher is None or options.photos is None:
        parser.error("--teacher and --photos are wanted, or --smoke")
    rival = [row for row in options.rows if row.startswith(RIVAL)]
    if rival and options.rival is None:
        parser.error(f"{rival[0]} wants --rival")
    return options


def main() -> None:
    options = parse()
    if options.smoke:
        teacher, photos = smoke(options)
    else:
        teacher = given_network(options.teacher)
        photos = read_images(options.photos, teacher.card)
    bench, options.out = Bench(options, teacher, photos), options.out
    rows = options.rows
    if not rows:
        rows = [row for row in ROWS if options.rival is not None or not row.startswith(RIVAL)]
    cells = {}
    with freed_memory_kept():
        for row in rows:
            for share in options.shares:
                start = time.perf_counter()
                cells[row, share] = bench.cell(Cell(row, share))
                print(f"{row} at {share:.0%}: {time.perf_counter() - start:.0f} s", flush=True)
    for row in ROWS:
        for share in options.shares:
            path = options.out / f"{Cell(row, share).name}.json"
            if path.is_file():
                cells[row, share] = json.loads(path.read_text(encoding="utf-8"))
    print(f"\n{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"dreamkit {dreamkit.__version__}; {teacher.card.name}, {len(bench.held)} photographs to")
    print(f"measure on; latencies of one image on one thread\n\n{table(cells, options.shares)}")


if __name__ == "__main__":
    main()
