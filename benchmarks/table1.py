"""Table 1 of DeepInversion: students taught without data, method by method, beside the paper's.

    python benchmarks/table1.py --seed 0 1 2                       # the recipes' own teacher
    python benchmarks/table1.py --methods deepinversion adaptive --preset paper
    python benchmarks/table1.py --set 'evaluation={source: folder, path: cifar10/test}'
    python benchmarks/table1.py --quick    # the mechanics: smoke presets

Every cell is a run of ``recipes/cifar10/<method>.yaml`` under --out; finished ones are read, not
repeated, and interrupted ones go on. ``--set`` changes all recipes alike (as of ``dreamkit run``):
another pair is --set 'teacher={source: cifar, model: resnet34, weights: ...}' --set
application.student.model=resnet18. The published figures are of that pair, or else of the paper's
ResNet-34 and ResNet-18.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from recipe_runs import RECIPES, add_budget, publish, run_recipe, spread
from rich.console import Console

from dreamkit.errors import DreamkitError

METHODS = ("noise", "deepdream", "deepinversion", "adaptive", "dafl", "fast_meta", "cmi", "nayer")
PAPER = {
    # Yin et al., CVPR 2020, Table 1: teacher, then noise, DeepDream, DeepInversion, Adaptive.
    ("vgg11_bn", "vgg11_bn"): (92.34, 13.55, 36.59, 84.16, 90.78),
    ("vgg11_bn", "resnet18"): (92.34, 13.45, 39.67, 83.82, 90.36),
    ("resnet34", "resnet18"): (95.42, 13.61, 29.98, 91.43, 93.26),
}
LARGE = ("resnet34", "resnet18")
PEERS = {"dafl": 92.22, "fast_meta": 93.63, "cmi": 94.84, "nayer": 95.21}
"""ResNet-34 to ResNet-18: as Fast-Datafree's README gives them (Fast-5), and NAYER's paper."""
KEYS = {
    "accuracy": "student.accuracy",
    "ratio": "student.accuracy_ratio",
    "teacher": "teacher.accuracy",
    "images": "synthesis.images",
    "synthesis_seconds": "synthesis.seconds",
    "training_seconds": "training.seconds",
}


def run_cell(
    method: str, seed: int, preset: str, changes: Sequence[str], out: Path, console: Console
) -> tuple[dict[str, float], tuple[str, str]]:
    """Return the figures of a recipe's run, and the pair of networks."""
    file = RECIPES / "cifar10" / f"{method}.yaml"
    folder = out / f"{method}-{preset}-{seed}"
    metrics, recipe = run_recipe(file, preset, [*changes, f"seed={seed}"], folder, console)
    models = recipe["teacher"]["model"], recipe["application"]["student"]["model"]
    pair = models[0].removeprefix("cifar10_"), models[1]
    return {name: metrics[key] for name, key in KEYS.items() if key in metrics}, pair


def published(method: str, pair: tuple[str, str]) -> str:
    """Return what was published for a method and a pair of networks, in per cent."""
    if method in METHODS[:4]:
        return f"{PAPER[pair][1 + METHODS.index(method)]:.2f}"
    return f"{PEERS[method]:.2f}" if pair == LARGE and method in PEERS else ""


def table(rows: dict[str, list[dict[str, float]]], pair: tuple[str, str]) -> str:
    """Write the results as Markdown."""
    other = pair if pair in PAPER else LARGE
    lines = [
        f"| {pair[0]} → {pair[1]} | student, % | of its teacher | teacher, % | images "
        f"| synthesis, s | training, s | published, {other[0]} → {other[1]}, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, cells in rows.items():
        found = {name: [cell[name] for cell in cells if name in cell] for name in KEYS}
        percent = {name: [100 * value for value in found[name]] for name in ("accuracy", "teacher")}
        shown = [
            method,
            spread(percent["accuracy"], 2),
            spread(found["ratio"], 3),
            spread(percent["teacher"], 2),
            f"{mean(found['images']):.0f}",
            spread(found["synthesis_seconds"], 0),
            spread(found["training_seconds"], 0),
            published(method, other),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add_budget(parser, "runs/table1")
    options = parser.parse_args()
    if options.quick:
        options.preset = "smoke"
    console = Console(stderr=True)
    rows: dict[str, list[dict[str, float]]] = {}
    pair = ("", "")
    try:
        for method in options.methods:
            for seed in options.seed:
                cell, pair = run_cell(
                    method, seed, options.preset, options.changes, options.out, console
                )
                rows.setdefault(method, []).append(cell)
    except DreamkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    publish(options, table(rows, pair), {"pair": pair, "results": rows})


if __name__ == "__main__":
    main()
