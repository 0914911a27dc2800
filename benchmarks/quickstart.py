"""Run the quickstart over several seeds: accuracy kept, what was saved, and how long it took.

python benchmarks/quickstart.py                 # seeds 0, 1 and 2
python benchmarks/quickstart.py --quick         # seed 0 alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamkit.latency.processor import processor_name
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.runner import run
from dreamkit.store.run_directory import read_report
from dreamkit.version import __version__

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
COLUMNS = (
    ("teacher.accuracy", "teacher"),
    ("pruned.accuracy", "pruned"),
    ("student.accuracy", "student"),
    ("ratio", "student / teacher"),
    ("flops_ratio", "FLOPs left"),
    ("latency_ratio", "latency left"),
    ("synthesis.statistics_distance", "statistics distance"),
    ("seconds", "seconds"),
)


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Run the recipe once and return its figures."""
    loaded = read_recipe(RECIPE, build_registries, None, [f"seed={seed}"])
    start = time.perf_counter()
    run(loaded, folder, Console(stderr=True))
    seconds = time.perf_counter() - start
    metrics: dict[str, float] = read_report(folder)["metrics"]
    return metrics | {
        "seconds": seconds,
        "ratio": metrics["student.accuracy"] / metrics["teacher.accuracy"],
        "flops_ratio": metrics["student.flops"] / metrics["teacher.flops"],
        "latency_ratio": metrics["student.latency_ms"] / metrics["teacher.latency_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--quick", action="store_true", help="the first seed alone")
    parser.add_argument("--json", type=Path, help="write every metric of every seed here")
    options = parser.parse_args()
    seeds: list[int] = options.seed[:1] if options.quick else options.seed
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            results[seed] = measure(seed, Path(folder) / str(seed))
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, float32, dreamkit {__version__},"
    )
    print(f"torch {torch.__version__}\n")
    print("| seed | " + " | ".join(title for _, title in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for seed, figures in results.items():
        print(_row(str(seed), [figures[key] for key, _ in COLUMNS]))
    if len(seeds) > 1:
        columns = [[figures[key] for figures in results.values()] for key, _ in COLUMNS]
        print(_row("mean", [statistics.mean(column) for column in columns]))
        print(_row("deviation", [statistics.stdev(column) for column in columns]))
    if options.json:
        data: dict[str, Any] = {"processor": processor_name(), "seeds": results}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{v:.4f}" if v < 10 else f"{v:.0f}" for v in values) + " |"


if __name__ == "__main__":
    main()
