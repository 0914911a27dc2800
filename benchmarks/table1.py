"""Table 1 of DeepInversion: students taught without data, method by method, beside the paper's.

    python benchmarks/table1.py --seed 0 1 2                  # ten minutes a cell, on two CPU cores
    python benchmarks/table1.py --budgets draft whole         # and two hours
    python benchmarks/table1.py --methods adaptive --budgets whole --curve   # accuracy by minutes
    python benchmarks/table1.py --set 'evaluation={source: folder, path: cifar10/test}'
    python benchmarks/table1.py --quick    # the mechanics: smoke presets

Every cell is a run of ``recipes/cifar10/<method>.yaml`` under --out, by one of its presets or
``whole``, the recipe as it is; finished ones are read, not repeated, and interrupted ones go on.
``--set`` changes all recipes alike (as of ``dreamkit run``): another pair is --set
'teacher={source: cifar, model: resnet34, weights: ...}' --set application.student.model=resnet18.
The published figures are of that pair, or else of the paper's ResNet-34 and ResNet-18.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from recipe_runs import RECIPES, add_runs, publish, run_recipe, spread
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
WHOLE = "whole"
Rows: TypeAlias = dict[str, dict[str, list[dict[str, Any]]]]
"""Figures of runs by method and budget, one for each seed."""
KEYS = {
    "accuracy": "student.accuracy",
    "ratio": "student.accuracy_ratio",
    "teacher": "teacher.accuracy",
    "images": "synthesis.images",
    "synthesis_seconds": "synthesis.seconds",
    "training_seconds": "training.seconds",
}


def run_cell(
    method: str, seed: int, budget: str, options: argparse.Namespace, console: Console
) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return the figures of a recipe's run, its curve among them, and the pair of networks."""
    file = RECIPES / "cifar10" / f"{method}.yaml"
    folder = options.out / f"{method}-{budget}-{seed}"
    preset = None if budget == WHOLE else budget
    changes = [*options.changes, f"seed={seed}"]
    if options.curve:
        changes.append(f"application.training.evaluate_every={options.every}")
    metrics, recipe = run_recipe(file, preset, changes, folder, console)
    models = recipe["teacher"]["model"], recipe["application"]["student"]["model"]
    pair = models[0].removeprefix("cifar10_"), models[1]
    found: dict[str, Any] = {name: metrics[key] for name, key in KEYS.items() if key in metrics}
    return found | {"curve": curve(folder)}, pair


def curve(folder: Path) -> list[tuple[int, float]]:
    """Return a run's looks at the test images: training steps, and the accuracy after them."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [
        (record["step"], record["numbers"]["accuracy"])
        for record in records
        if record.get("stage") == "training accuracy"
    ]


def published(method: str, pair: tuple[str, str]) -> str:
    """Return what was published for a method and a pair of networks, in per cent."""
    if method in METHODS[:4]:
        return f"{PAPER[pair][1 + METHODS.index(method)]:.2f}"
    return f"{PEERS[method]:.2f}" if pair == LARGE and method in PEERS else ""


def table(rows: Rows, budgets: Sequence[str], pair: tuple[str, str]) -> str:
    """Write the results as Markdown: the ratio to the teacher first, a column for each budget."""
    other = pair if pair in PAPER else LARGE
    head = [f"{pair[0]} → {pair[1]}"]
    head += [f"of its teacher, {budget}" for budget in budgets]
    head += [f"student, %, {budget}" for budget in budgets]
    head += ["teacher, %", "images", "synthesis, s", "training, s"]
    head.append(f"published, {other[0]} → {other[1]}, %")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, by_budget in rows.items():
        found = [
            {name: [cell[name] for cell in by_budget[budget] if name in cell] for name in KEYS}
            for budget in budgets
        ]
        shown = [method]
        shown += [spread(one["ratio"], 3) for one in found]
        shown += [spread([100 * value for value in one["accuracy"]], 2) for one in found]
        shown.append(spread([100 * value for value in found[0]["teacher"][:1]], 2))
        for name in ("images", "synthesis_seconds", "training_seconds"):
            shown.append("; ".join(f"{mean(one[name]):.0f}" if one[name] else "-" for one in found))
        shown.append(published(method, other))
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def curves(rows: Rows, budgets: Sequence[str]) -> str:
    """Write each run's looks at the test images as Markdown.

    Minutes are the run's share of its dreaming and training, as if both went on evenly.
    """
    lines = []
    for method, by_budget in rows.items():
        for budget in budgets:
            for number, cell in enumerate(by_budget[budget]):
                if not cell["curve"]:
                    continue
                spent = cell["synthesis_seconds"] + cell["training_seconds"]
                last = cell["curve"][-1][0]
                minutes = [f"{spent * step / last / 60:.0f}" for step, _ in cell["curve"]]
                ratios = [f"{found / cell['teacher']:.3f}" for _, found in cell["curve"]]
                steps = [str(step) for step, _ in cell["curve"]]
                lines += [
                    "",
                    f"| {method}, {budget}, run {number + 1}: steps | {' | '.join(steps)} |",
                    "|---" * (len(steps) + 1) + "|",
                    f"| minutes | {' | '.join(minutes)} |",
                    f"| of its teacher | {' | '.join(ratios)} |",
                ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add_runs(parser, "runs/table1")
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=["draft"],
        help=f"presets, or '{WHOLE}' for the recipe as it is",
    )
    parser.add_argument("--curve", action="store_true", help="show accuracy as it rises, too")
    parser.add_argument("--every", type=int, default=500, help="training steps between looks")
    options = parser.parse_args()
    if options.quick:
        options.budgets = ["smoke"]
    options.preset = " and ".join(options.budgets)
    console = Console(stderr=True)
    rows: Rows = {}
    pair = ("", "")
    try:
        for method in options.methods:
            rows[method] = {budget: [] for budget in options.budgets}
            for budget in options.budgets:
                for seed in options.seed:
                    cell, pair = run_cell(method, seed, budget, options, console)
                    rows[method][budget].append(cell)
    except DreamkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = table(rows, options.budgets, pair)
    if options.curve:
        text += "\n" + curves(rows, options.budgets)
    publish(options, text, {"pair": pair, "results": rows})


if __name__ == "__main__":
    main()
