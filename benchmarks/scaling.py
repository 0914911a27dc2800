"""How dreaming scales: with processes, images, resolution and the depth of the network.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 4 --threads 4
    python benchmarks/scaling.py --quick          # seconds; the mechanics

Processes are torchrun's, each with --threads threads, on one machine; images/s is of the dreaming
alone, from the first batch begun to the last one done, without starting and compiling. They take
turns: each number of processes is measured --repeats times, and the median counts. The other tables
are of one process with the same threads: seconds a step of an inversion, of random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from cifar_10 import random_resnet, tuned_fourier

from dreamkit.latency.processor import processor_name
from dreamkit.types import BatchPlan

RECIPES = Path(__file__).parents[1] / "recipes"
DEPTHS = (20, 32, 56)
BATCHES = (64, 128, 256, 512)


def images_per_second(processes: int, options: argparse.Namespace) -> float:
    """Dream with torchrun; return images a second between the first batch's and the last one's end.

    Every process has dreamed a batch before the clock starts, so that none is still starting.
    """
    batches = processes * (1 + options.batches)
    changes = {
        "synthesis.images": batches * options.batch,
        "synthesis.batch_size": options.batch,
        "synthesis.stages": [{"steps": options.steps}],
        "synthesis.engine": {"precision": "auto", "compile": False},
        "application": {"name": "synthesize"},
        "evaluation": None,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "dreamkit", "run"]
    command += [str(RECIPES / "cifar10" / "deepinversion.yaml")]
    for path, value in changes.items():
        command += ["--set", f"{path}={json.dumps(value)}"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(
            [*command, "--out", str(folder)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        ends = sorted(path.stat().st_mtime for path in (folder / "dreams").glob("shard-*"))
    # After the first batch of every process: what is left is done with all of them at work.
    spent: float = ends[-1] - ends[processes - 1]
    timed: int = (batches - processes) * options.batch
    return timed / spent


def seconds_a_step(depth: int, batch: int, side: int, steps: int) -> float:
    """Return what a step of an inversion takes, eager, for a network of random weights."""
    teacher = random_resnet(depth)
    teacher = replace(teacher, card=replace(teacher.card, input_size=(3, side, side)))
    options = tuned_fourier(batch, steps + 2)
    times: list[float] = []
    with options.session(teacher, torch.device("cpu"), {"compile": False}) as dreamer:
        plan = BatchPlan(0, 0, batch, 0)
        dreamer.dream(plan, lambda done, terms: times.append(time.perf_counter()))
    gaps = [after - before for before, after in pairwise(times[1:])]
    return statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="of a batch")
    parser.add_argument("--batches", type=int, default=6, help="timed ones, for each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing here is random")
    parser.add_argument("--quick", action="store_true", help="the mechanics")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.steps, options.batches, options.repeats = 8, 2, 2, 1
    torch.set_num_threads(options.threads)
    steps = 2 if options.quick else 8

    rates: dict[int, list[float]] = {number: [] for number in options.processes}
    for _ in range(options.repeats):
        for number in options.processes:
            rates[number].append(images_per_second(number, options))
    depths = DEPTHS[:1] if options.quick else DEPTHS
    batches = BATCHES[:1] if options.quick else BATCHES
    sides = (16, 32) if options.quick else (16, 32, 64)
    tables = {
        "depth": {d: seconds_a_step(d, options.batch, 32, steps) for d in depths},
        "batch": {b: seconds_a_step(20, b, 32, steps) for b in batches},
        "side": {s: seconds_a_step(20, options.batch, s, steps) for s in sides},
    }

    print(f"{processor_name()}, {options.threads} threads a process, torch {torch.__version__}\n")
    print(f"| processes | images/s ({options.steps} steps, {options.batch} a batch) | times one |")
    print("|---|---|---|")
    single = statistics.median(rates[options.processes[0]])
    for number, found in rates.items():
        rate, spread = statistics.median(found), f"{min(found):.2f} to {max(found):.2f}"
        print(f"| {number} | {rate:.2f} ({spread}) | {rate / single:.2f} |")
    titles = {
        "depth": f"ResNet of depth, {options.batch} images of 32²",
        "batch": "images a batch, ResNet-20, 32²",
        "side": f"side of the images, ResNet-20, {options.batch} of them",
    }
    for name, costs in tables.items():
        first = next(iter(costs.values()))
        print(f"\n| {titles[name]} | s a step | times the first |\n|---|---|---|")
        for value, seconds in costs.items():
            print(f"| {value} | {seconds:.4f} | {seconds / first:.2f} |")
    if options.json:
        data = {"processor": processor_name(), "threads": options.threads}
        options.json.write_text(json.dumps(data | {"rates": rates, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
