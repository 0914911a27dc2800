"""Table 7 of DeepInversion: new classes learnt without the data of the old ones, by every method.

    python benchmarks/table7.py --seed 0 1 2                       # CIFAR-10: 6 to 8 to 10 classes
    python benchmarks/table7.py --train cifar10/train --test cifar10/test     # from image folders
    python benchmarks/table7.py --methods finetune deepinversion --steps 1
    python benchmarks/table7.py --preset five_tasks+draft --steps 4    # 2, 4, 6, 8, 10 classes
    python benchmarks/table7.py --recipe recipes/imagenet/continual_cub_flowers.yaml --preset paper
    python benchmarks/table7.py --train cifar10/train --test cifar10/test --quick   # the mechanics

Every cell is a run of the recipe under --out with the method's preset; finished ones are read, not
repeated, and interrupted ones go on. With one step the last set of classes is left out. Combined is
the mean of the accuracies on each set, as in the paper, whose figures are of a ResNet-18 for
ImageNet that learns CUB and then Flowers: beside ours only the order compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recipe_runs import RECIPES, add_budget, publish, run_recipe, spread
from rich.console import Console

from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe

METHODS = (
    "finetune",
    "lwf_mc",
    "deepdream",
    "deepinversion",
    "adaptive",
    "abd",
    "oracle_distill",
    "oracle_classify",
)
PAPER = {
    # Yin et al., CVPR 2020, Table 7, ResNet-18: combined after +CUB, and after +CUB+Flowers.
    "lwf_mc": (47.64, 41.72),
    "deepdream": (63.00, None),
    "deepinversion": (67.61, 74.61),
    "oracle_distill": (69.12, 76.18),
    "oracle_classify": (68.17, 74.67),
}


def changes_of(method: str, options: argparse.Namespace) -> list[str]:
    """Return what of the recipe changes, as of ``dreamkit run --set``."""
    loaded = read_recipe(options.recipe, build_registries, options.preset, options.changes)
    recipe: Any = loaded.root.plain()
    sets = recipe["application"]["sets"][: options.steps]
    changes: dict[str, object] = {"application.sets": sets}
    base: Any = (recipe.get("evaluation") or {}).get("classes")
    if method.startswith("oracle") and base is not None:
        changes["application.replay.classes"] = base
    if options.train is not None:
        if base is None:
            raise DreamkitError(
                f"{options.recipe}: evaluation names no classes, which --train takes"
            )
        for added in sets:
            added["train"] = folder(options.train, added["train"]["classes"])
            added["test"] = folder(options.test, added["test"]["classes"])
        changes["evaluation"] = folder(options.test, base)
        if method.startswith("oracle"):
            changes["application.replay"] = folder(options.train, base)
            changes.pop("application.replay.classes", None)
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def folder(path: Path, classes: list[str]) -> dict[str, object]:
    return {"source": "folder", "path": str(path), "classes": classes}


def run_method(
    method: str, options: argparse.Namespace, console: Console
) -> list[dict[str, float]]:
    """Run a method with every seed; return the metrics of each."""
    chosen = None if method == "deepinversion" else method
    preset = "+".join(name for name in (options.preset, chosen) if name)
    changes = [*changes_of(method, options), *options.changes]
    found = []
    for seed in options.seed:
        run = options.out / f"{method}-{options.preset}-{options.steps}-{seed}"
        metrics, _ = run_recipe(options.recipe, preset, [*changes, f"seed={seed}"], run, console)
        found.append(metrics)
    return found


def table(results: dict[str, list[dict[str, float]]], steps: int) -> str:
    """Write the results as Markdown."""
    first = next(iter(results.values()))[0]
    last = [
        key.removeprefix(f"step{steps}.").removesuffix(".accuracy")
        for key in first
        if key.startswith(f"step{steps}.") and key.count(".") == 2 and key.endswith(".accuracy")
    ]
    between = [f"combined after {step}" for step in range(1, steps)]
    header = ["method", *between, "combined", *last, "forgetting", "dreams, s", "training, s"]
    header += ["paper: combined after 1", "after 2"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, runs in results.items():
        keys = [f"step{step}.combined" for step in range(1, steps + 1)]
        keys += [f"step{steps}.{name}.accuracy" for name in last] + [f"step{steps}.forgetting"]
        cells = [spread([100 * m[key] for m in runs if key in m], 2) for key in keys]
        cells += [
            spread([m[key] for m in runs if key in m], 0)
            for key in ("synthesis.seconds", "training.seconds")
        ]
        paper = [
            "" if value is None else f"{value:.2f}" for value in PAPER.get(method, (None, None))
        ]
        lines.append("| " + " | ".join([method, *cells, *paper]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=RECIPES / "cifar10" / "continual.yaml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=2, help="how many of its sets are learnt")
    parser.add_argument("--train", type=Path, help="class folders in place of the recipe's sources")
    parser.add_argument("--test", type=Path, help="and those to judge by")
    add_budget(parser, "runs/table7")
    options = parser.parse_args()
    if (options.train is None) != (options.test is None):
        parser.error("give --train and --test together")
    if options.quick:
        options.preset = "smoke"
    return options


def main() -> None:
    options = parse()
    console = Console(stderr=True)
    try:
        results = {method: run_method(method, options, console) for method in options.methods}
    except DreamkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    publish(options, table(results, options.steps), {"results": results})


if __name__ == "__main__":
    main()
