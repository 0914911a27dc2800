"""DeepDream against DeepInversion in the eyes of other networks: Tables 2 and 3 of the paper.

python benchmarks/tables2_3.py --teacher resnet20.th --verifier resnet32.th resnet56.th
python benchmarks/tables2_3.py --teacher ... --verifier ... --reference cifar10/test
python benchmarks/tables2_3.py --teacher ... --verifier ... --competitor resnet44.th   # and ADI
python benchmarks/tables2_3.py --teacher ... --verifier ... --quick      # seconds; means nothing

Teacher, verifiers and competitor are networks of the same classes. All kinds of dreams have the
same settings, labels and seeds: noise is the classification loss alone, on pixels; DeepDream lacks
R_feature, and has total variation where the settings have no other prior; Adaptive DeepInversion
competes with a trained network that judges nothing. What is judged is stored, in 8 bits a pixel.
The paper's figures (Yin et al., CVPR 2020) are of a ResNet-50 for ImageNet and of 20,000 steps. Its
Table 3 is the Inception score; ours is that formula with each verifier, a classifier score, which
no more images can pass than a split has.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from cifar_10 import tuned_fourier, tuned_pixels
from given import NETWORK, default_settings, drawn_classes, given_network
from plain_loop import paper_settings
from torch import nn

from dreamkit.applications.judge import check_verifier, metric_names
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.cross_model import observe
from dreamkit.evaluation.features import find_layer
from dreamkit.evaluation.judgement import Judgement, judge_by
from dreamkit.latency.processor import processor_name
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.report.figures import grid
from dreamkit.sources.folder import Folder
from dreamkit.stages.batches import batch_plans
from dreamkit.synthesizers.automatic_terms import STATISTICS
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.types import Images, Regularizer, StoredImages, Teacher
from dreamkit.version import __version__

CIFAR_SETTINGS = {"paper": paper_settings, "pixels": tuned_pixels, "fourier": tuned_fourier}
CIFAR_STEPS = {"paper": 2000, "pixels": 500, "fourier": 200}
REAL = "real images"
PAPER_TABLE_2 = {
    "ResNet-18": {"DeepDream": 28.0, "DeepInversion": 94.4},
    "Inception-V3": {"DeepDream": 27.6, "DeepInversion": 92.7},
    "MobileNet-V2": {"DeepDream": 13.9, "DeepInversion": 90.9},
    "VGG-11": {"DeepDream": 6.7, "DeepInversion": 80.1},
}
PAPER_TABLE_3 = {"DeepDream": 6.2, "DeepInversion": 60.6}


def kinds(full: DeepInversion, compete: float | None) -> dict[str, DeepInversion]:
    """Return the paper's ladder, from the settings of its third rung.

    Args:
        full: DeepInversion's.
        compete: weight of the competition with a student; None leaves ADI out.
    """
    terms = STATISTICS if full.regularizers == "auto" else full.regularizers
    priors = tuple(term for term in terms if term.name != "bn_feature")
    priors = priors or (Term("tv", 1e-3, TotalVariation()),)
    made = {
        "Noise": replace(full, regularizers=(), parameterisation=Pixels()),
        "DeepDream": replace(full, regularizers=priors),
        "DeepInversion": full,
    }
    if compete is not None:
        rival: Term[Regularizer] = Term("js_compete", compete, JSCompete())
        made["ADI"] = replace(full, regularizers=(*terms, rival))
    return made


def dream(
    options: DeepInversion,
    teacher: Teacher,
    seed: int,
    device: torch.device,
    student: nn.Module | None = None,
) -> tuple[StoredImages, dict[str, Any], float]:
    """Dream every batch; return the images as stored, how they were computed, and the seconds."""
    start, images, labels = time.perf_counter(), [], []
    with options.session(teacher, device, student=student) as session:
        session.prepare(options.images)
        for plan in batch_plans(options.images, session.batch_size, seed):
            found = session.dream(plan, lambda step, terms: None)
            images.append(teacher.card.to_stored(found.images).cpu())
            labels.append(found.labels.cpu())
        choices = dict(session.choices)
    stored = StoredImages(torch.cat(images), torch.cat(labels))
    return stored, choices, time.perf_counter() - start


def some(images: Images, number: int, seed: int) -> StoredImages:
    """Return as many images as there are dreams, drawn, so that their scores compare."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return StoredImages(*images.batch(order[:number].tolist()))


def judge(
    judged: dict[str, StoredImages],
    verifier: Teacher,
    reference: Images | None,
    splits: int,
    seed: int,
    device: torch.device,
) -> dict[str, Judgement]:
    """Return what a verifier says of each kind of images."""
    layer = find_layer(verifier.model, verifier.card, None)[0]
    return {
        kind: judge_by(
            verifier, images, None if kind == REAL else reference, layer, splits, seed, device
        )
        for kind, images in judged.items()
    }


def table_2(own: dict[str, float | None], found: dict[str, dict[str, Judgement]]) -> str:
    """Write the accuracies, in percent, with the paper's below."""
    lines = _head(["images of", "classified by", *own])
    lines.append(_row("the teacher", "the teacher itself", [_percent(own[k]) for k in own]))
    for name, judged in found.items():
        lines.append(_row("the teacher", name, [_percent(judged[kind].accuracy) for kind in own]))
    for name, figures in PAPER_TABLE_2.items():
        cells = [f"{figures[kind]:.1f}" if kind in figures else "" for kind in own]
        lines.append(_row("ResNet-50, ImageNet (paper)", name, cells))
    return "\n".join(lines)


def table_3(found: dict[str, dict[str, Judgement]]) -> str:
    """Write the scores, with the paper's below, and the Fréchet distances where there are any."""
    names = list(next(iter(found.values())))
    lines = _head(["measure", "by", *names])
    for verifier, judged in found.items():
        scores = [judged[name].score for name in names]
        cells = [f"{score.mean:.2f} ± {score.std:.2f}" for score in scores]
        lines.append(_row("classifier score", verifier, cells))
    cells = [f"{PAPER_TABLE_3[name]:.1f}" if name in PAPER_TABLE_3 else "" for name in names]
    lines.append(_row("Inception score, ImageNet (paper)", "Inception-V3", cells))
    for verifier, judged in found.items():
        distances = [judged[name].frechet_distance for name in names]
        if any(distance is not None for distance in distances):
            cells = ["" if distance is None else f"{distance:.2f}" for distance in distances]
            lines.append(_row("Fréchet distance at the penultimate layer", verifier, cells))
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _row(first: str, second: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, second, *cells]) + " |"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help=NETWORK)
    parser.add_argument("--verifier", required=True, action="extend", nargs="+", help="others")
    parser.add_argument("--competitor", help="one more, for ADI, which is left out without")
    parser.add_argument("--compete", type=float, default=1.0, help="weight of the competition")
    parser.add_argument("--images", type=int, default=1024, help="of each kind of dreams")
    parser.add_argument("--batch", type=int, help="dreamed together; 256 with settings of CIFAR")
    parser.add_argument(
        "--settings",
        choices=["default", *CIFAR_SETTINGS],
        default="default",
        help="dreamkit.invert's, or some for 32x32 images",
    )
    parser.add_argument("--steps", type=int, help=f"of a batch; of CIFAR's settings {CIFAR_STEPS}")
    parser.add_argument("--splits", type=int, default=10, help="of the classifier score")
    parser.add_argument("--reference", type=Path, help="folder of real images, at any depth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="32 images, 3 steps: the mechanics")
    parser.add_argument("--pictures", type=Path, help="write a grid of each kind's dreams here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if options.quick:
        options.images, options.steps, options.splits = 32, 3, 4
    return options


def _settings(options: argparse.Namespace, teacher: Teacher) -> dict[str, DeepInversion]:
    """Return how each kind is dreamed."""
    images, settings = options.images, options.settings
    if settings == "default":
        full = default_settings(teacher, images, options.batch, options.steps)
    else:
        batch = min(options.batch or 256, images)
        steps = options.steps or CIFAR_STEPS[settings]
        full = replace(CIFAR_SETTINGS[settings](batch, steps), images=images)
    labels = drawn_classes(teacher.card, images, options.seed)
    compete = None if options.competitor is None else options.compete
    return kinds(replace(full, labels=labels), compete)


def _networks(options: argparse.Namespace) -> tuple[Teacher, list[Teacher], Teacher | None]:
    """Return the teacher, its verifiers and the competitor, each of other weights."""
    teacher = given_network(options.teacher)
    verifiers = [given_network(text) for text in options.verifier]
    competitor = None if options.competitor is None else given_network(options.competitor)
    try:
        for verifier in verifiers:
            check_verifier(verifier, teacher)
        if competitor is not None:
            for other in (teacher, *verifiers):
                check_verifier(competitor, other)
    except DreamkitError as error:
        raise SystemExit(error.message) from error
    return teacher, verifiers, competitor


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    teacher, verifiers, competitor = _networks(options)
    reference: Images | None = None
    if options.reference is not None:
        reference = Folder(str(options.reference), labelled=False).open(teacher.card)
    teacher.model.to(device)
    student = None if competitor is None else competitor.model.to(device)
    settings = _settings(options, teacher)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    print(f"{processor}, {torch.get_num_threads()} threads, dreamkit {__version__},")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; verifiers in float32")
    print(
        f"{teacher.card.name}: {options.images} images of each kind, "
        f"{settings['DeepInversion'].steps_per_batch} steps a batch, settings "
        f"'{options.settings}', seed {options.seed}, {options.splits} splits, "
        f"{0 if reference is None else len(reference)} real images",
        flush=True,
    )
    judged: dict[str, StoredImages] = {}
    synthesis: dict[str, dict[str, Any]] = {}
    for kind, made in settings.items():
        rival = student if kind == "ADI" else None
        judged[kind], choices, seconds = dream(made, teacher, options.seed, device, rival)
        synthesis[kind] = {"seconds": seconds, **choices}
        print(f"{kind}: {seconds:.0f} s, {choices}", flush=True)
    own = {kind: observe(teacher, images, device).accuracy for kind, images in judged.items()}
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for kind, shown in judged.items():
            grid(shown.images[:64], shown.labels[:64]).save(options.pictures / f"{kind}.png")
    if reference is not None:
        judged[REAL] = some(reference, options.images, options.seed)
    names = metric_names([verifier.card.name for verifier in verifiers])
    found = {
        name: judge(judged, verifier, reference, options.splits, options.seed, device)
        for name, verifier in zip(names, verifiers, strict=True)
    }
    print(f"\nAccuracy in % (Table 2)\n\n{table_2(own, found)}")
    print(f"\nScores (Table 3)\n\n{table_3(found)}")
    if any(judgement.biased for judged in found.values() for judgement in judged.values()):
        print("\nToo few images for so many features: the Fréchet distances are biased upwards.")
    if options.json:
        told = {name: _plain(value) for name, value in vars(options).items()}
        told |= {"teacher": teacher.card.name, "verifier": names}
        told["competitor"] = None if competitor is None else competitor.card.name
        data = {
            "processor": processor,
            "options": told,
            "synthesis": synthesis,
            "teacher": own,
            "verifiers": {n: {k: j.metrics() for k, j in js.items()} for n, js in found.items()},
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Return an option as JSON takes it; files by their names alone."""
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
