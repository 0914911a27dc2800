"""DeepDream against DeepInversion in the eyes of other networks: Tables 2 and 3 of the paper.

python benchmarks/tables2_3.py --teacher resnet20.th --verifier resnet32.th resnet56.th
python benchmarks/tables2_3.py --teacher ... --verifier ... --reference cifar10/test
python benchmarks/tables2_3.py --teacher ... --verifier ... --quick      # seconds; means nothing

Teacher and verifiers are CIFAR-10 networks of github.com/akamaster/pytorch_resnet_cifar10. Both
kinds of dreams have the same settings and seeds; DeepDream lacks R_feature, and has total variation
where the settings have no other prior. What is judged is stored, in 8 bits a pixel.
The paper's figures (Yin et al., CVPR 2020) are of ImageNet: beside ours only the order compares.
Its Table 3 is the Inception score; ours is that formula with each verifier, a classifier score.
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
from cifar_10 import cifar_checkpoint, tuned_fourier, tuned_pixels
from plain_loop import paper_settings

from dreamkit.applications.judge import check_verifier, metric_names
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.cross_model import observe
from dreamkit.evaluation.features import find_layer
from dreamkit.evaluation.judgement import Judgement, judge_by
from dreamkit.latency.processor import processor_name
from dreamkit.registry import Term
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.sources.folder import Folder
from dreamkit.stages.batches import batch_plans
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.types import Images, StoredImages, Teacher
from dreamkit.version import __version__

SETTINGS = {"paper": paper_settings, "pixels": tuned_pixels, "fourier": tuned_fourier}
STEPS = {"paper": 2000, "pixels": 500, "fourier": 200}
KINDS = ("DeepDream", "DeepInversion")
PAPER_TABLE_2 = {
    "ResNet-18": (28.0, 94.4),
    "Inception-V3": (27.6, 92.7),
    "MobileNet-V2": (13.9, 90.9),
    "VGG-11": (6.7, 80.1),
}
PAPER_TABLE_3 = (6.2, 60.6)


def without_statistics(options: DeepInversion) -> DeepInversion:
    """Return DeepDream of the same settings: the priors alone."""
    priors = tuple(term for term in options.regularizers if term.name != "bn_feature")
    return replace(options, regularizers=priors or (Term("tv", 1e-3, TotalVariation()),))


def dream(
    options: DeepInversion, teacher: Teacher, seed: int, device: torch.device
) -> tuple[StoredImages, dict[str, Any], float]:
    """Dream every batch; return the images as stored, how they were computed, and the seconds."""
    start, images, labels = time.perf_counter(), [], []
    with options.session(teacher, device) as session:
        session.prepare(options.images)
        for plan in batch_plans(options.images, session.batch_size, seed):
            found = session.dream(plan, lambda step, terms: None)
            images.append(teacher.card.to_stored(found.images).cpu())
            labels.append(found.labels.cpu())
        choices = dict(session.choices)
    stored = StoredImages(torch.cat(images), torch.cat(labels))
    return stored, choices, time.perf_counter() - start


def judge(
    dreams: dict[str, StoredImages],
    verifier: Teacher,
    reference: Images | None,
    splits: int,
    seed: int,
    device: torch.device,
) -> dict[str, Judgement]:
    """Return what a verifier says of each kind of dreams."""
    layer = find_layer(verifier.model, verifier.card, None)[0]
    return {
        kind: judge_by(verifier, images, reference, layer, splits, seed, device)
        for kind, images in dreams.items()
    }


def table_2(own: dict[str, float | None], found: dict[str, dict[str, Judgement]]) -> str:
    """Write the accuracies, in percent, with the paper's below."""
    lines = ["| images of | classified by | DeepDream | DeepInversion |", "|---|---|---|---|"]
    lines.append(_row("the teacher", "the teacher itself", [_percent(own[k]) for k in KINDS]))
    for name, judged in found.items():
        cells = [_percent(judged[kind].accuracy) for kind in KINDS]
        lines.append(_row("the teacher", name, cells))
    for name, figures in PAPER_TABLE_2.items():
        cells = [f"{figure:.1f}" for figure in figures]
        lines.append(_row("ResNet-50, ImageNet (paper)", name, cells))
    return "\n".join(lines)


def table_3(found: dict[str, dict[str, Judgement]]) -> str:
    """Write the scores, with the paper's below, and the Fréchet distances where there are any."""
    lines = ["| measure | by | DeepDream | DeepInversion |", "|---|---|---|---|"]
    for name, judged in found.items():
        scores = [judged[kind].score for kind in KINDS]
        cells = [f"{score.mean:.2f} ± {score.std:.2f}" for score in scores]
        lines.append(_row("classifier score", name, cells))
    cells = [f"{figure:.1f}" for figure in PAPER_TABLE_3]
    lines.append(_row("Inception score, ImageNet (paper)", "Inception-V3", cells))
    for name, judged in found.items():
        distances = [judged[kind].frechet_distance for kind in KINDS]
        if distances[0] is not None:
            cells = [f"{distance:.2f}" for distance in distances]
            lines.append(_row("Fréchet distance at the penultimate layer", name, cells))
    return "\n".join(lines)


def _row(first: str, second: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, second, *cells]) + " |"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="e.g. resnet20-12fca82f.th")
    parser.add_argument(
        "--verifier", type=Path, required=True, action="extend", nargs="+", help="other checkpoints"
    )
    parser.add_argument("--images", type=int, default=1024, help="of each kind of dreams")
    parser.add_argument("--batch", type=int, default=256, help="dreamed together")
    parser.add_argument("--settings", choices=list(SETTINGS), default="pixels")
    parser.add_argument("--steps", type=int, help=f"of a batch; by default {STEPS}")
    parser.add_argument("--splits", type=int, default=10, help="of the classifier score")
    parser.add_argument("--reference", type=Path, help="folder of folders of real images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="32 images, 3 steps: the mechanics")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    options.steps = options.steps or STEPS[options.settings]
    if options.quick:
        options.images, options.steps, options.splits = 32, 3, 4
    return options


def _settings(options: argparse.Namespace) -> dict[str, DeepInversion]:
    """Return how each kind is dreamed."""
    batch = min(options.batch, options.images)
    full = replace(SETTINGS[options.settings](batch, options.steps), images=options.images)
    return dict(zip(KINDS, (without_statistics(full), full), strict=True))


def _print_setup(options: argparse.Namespace, processor: str, reference: Images | None) -> None:
    print(f"{processor}, {torch.get_num_threads()} threads, dreamkit {__version__},")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; verifiers in float32")
    print(f"{options.teacher.name}: {options.images} images of each kind, {options.steps} steps,")
    real = 0 if reference is None else len(reference)
    print(
        f"settings '{options.settings}', seed {options.seed}, {options.splits} splits, {real} real "
        "images",
        flush=True,
    )


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    teacher = cifar_checkpoint(options.teacher)
    verifiers = [cifar_checkpoint(path) for path in options.verifier]
    try:
        for verifier in verifiers:
            check_verifier(verifier, teacher)
    except DreamkitError as error:
        raise SystemExit(error.message) from error
    reference: Images | None = None
    if options.reference is not None:
        reference = Folder(str(options.reference), labelled=False).open(teacher.card)
    teacher.model.to(device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    _print_setup(options, processor, reference)
    dreams: dict[str, StoredImages] = {}
    synthesis: dict[str, dict[str, Any]] = {}
    for kind, made in _settings(options).items():
        dreams[kind], choices, seconds = dream(made, teacher, options.seed, device)
        synthesis[kind] = {"seconds": seconds, **choices}
        print(f"{kind}: {seconds:.0f} s, {choices}", flush=True)
    own = {kind: observe(teacher, images, device).accuracy for kind, images in dreams.items()}
    names = metric_names([verifier.card.name for verifier in verifiers])
    found = {
        name: judge(dreams, verifier, reference, options.splits, options.seed, device)
        for name, verifier in zip(names, verifiers, strict=True)
    }
    print(f"\nAccuracy in % (Table 2)\n\n{table_2(own, found)}")
    print(f"\nScores (Table 3)\n\n{table_3(found)}")
    if any(judgement.biased for judged in found.values() for judgement in judged.values()):
        print("\nToo few images for so many features: the Fréchet distances are biased upwards.")
    if options.json:
        data = {
            "processor": processor,
            "options": {name: _plain(value) for name, value in vars(options).items()},
            "synthesis": synthesis,
            "teacher": own,
            "verifiers": {n: {k: j.metrics() for k, j in js.items()} for n, js in found.items()},
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Return an option as JSON takes it; files by their names alone."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
