"""Time until dreams are good: a plain loop of the paper's settings, and dreamkit's presets.

python benchmarks/time_to_quality.py --teacher resnet20.th --verifier resnet32.th   # 45 minutes
python benchmarks/time_to_quality.py --teacher ... --verifier ... --quick           # 5 minutes

The teacher and the verifier are CIFAR-10 networks of github.com/akamaster/pytorch_resnet_cifar10.
A batch is judged on what would be stored (8-bit pixels): R_feature, unscaled and summed over the
layers, and how often the verifier, another network, sees the class that was asked for.
The aim is what the plain loop has after its last step, its R_feature before pixels are clipped. Its
time is without the judging in between.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cifar_10 import cifar_checkpoint, tuned_fourier, tuned_pixels
from plain_loop import PlainLoop, paper_settings
from torch import Tensor

from dreamkit.arithmetic import has_native_bfloat16
from dreamkit.latency.processor import processor_name
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.report.figures import grid
from dreamkit.stages.batches import as_stored, batch_seed
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Dream, InversionStep, Teacher

MARKS = (50, 100, 200, 400, 800, 1200, 1600)
"""Steps after which the plain loop is judged, besides its last."""


@dataclass(frozen=True)
class Quality:
    """What a batch of dreams is worth; R_feature also before pixels are clipped and rounded."""

    unclipped: float
    r_feature: float
    teacher_accuracy: float
    verifier_accuracy: float


def quality(images: Tensor, labels: Tensor, teacher: Teacher, verifier: Teacher) -> Quality:
    """Judge a batch as it would be stored."""
    content, stored = as_stored(Dream(images, labels, 0.0), teacher)
    with torch.no_grad(), tapped(teacher.model) as tap:
        logits, statistics = tap(images)
    unclipped = BNFeature("paper").per_layer(
        InversionStep(images, labels, logits, None, statistics)
    )
    assert content.teacher_logits is not None
    assert stored.r_feature is not None
    with torch.no_grad():
        seen = verifier.model(verifier.card.normalise(content.images))
    return Quality(
        float(sum(unclipped.values())),
        stored.r_feature,
        float((content.teacher_logits.argmax(1) == content.labels).float().mean()),
        float((seen.argmax(1) == content.labels).float().mean()),
    )


def presets(batch: int, plain_steps: int) -> dict[str, DeepInversion]:
    """Return the settings that are compared."""
    paper = paper_settings(batch, plain_steps)
    pixels, fourier = tuned_pixels(batch, plain_steps), tuned_fourier(batch, plain_steps)

    def steps(options: DeepInversion, *numbers: int) -> DeepInversion:
        sizes = (32,) if len(numbers) == 1 else (16, 32)
        stages = tuple(Stage(n, size) for n, size in zip(numbers, sizes, strict=True))
        return replace(options, stages=stages)

    return {
        "paper's settings, pixels": paper,
        "tuned, pixels, 400 steps": steps(pixels, 400),
        "tuned, pixels, 200@16 + 300@32": steps(pixels, 200, 300),
        "fourier, 50 steps": steps(fourier, 50),
        "fourier, 100 steps": steps(fourier, 100),
        "fourier, 120 steps": steps(fourier, 120),
        "fourier, 150 steps": steps(fourier, 150),
        "fourier, 100@16 + 75@32": steps(fourier, 100, 75),
        "fourier, flip, 100 steps": replace(steps(fourier, 100), flip=True),
        "fourier, flip, 200 steps": replace(steps(fourier, 200), flip=True),
        "fourier, constant, patience 50": replace(
            steps(fourier, 400), schedule="constant", patience=50
        ),
    }


def run_plain(
    batch: int, steps: int, teacher: Teacher, verifier: Teacher
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Run the plain loop and judge its best images now and then."""
    loop = PlainLoop(teacher.model, (batch, *teacher.card.input_size), 10, torch.device("cpu"))
    rows, seconds = [], 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loop.step()
        seconds += time.perf_counter() - start
        if step in MARKS or step == steps:
            found = quality(loop.best, loop.labels, teacher, verifier)
            rows.append({"steps": step, "seconds": seconds, **vars(found)})
            print(row(f"plain loop, {step} steps", [rows[-1]]), flush=True)
    loop.close()
    return rows, loop.best, loop.labels


def run_preset(
    options: DeepInversion, seeds: list[int], teacher: Teacher, verifier: Teacher
) -> tuple[list[dict[str, Any]], Dream]:
    """Dream one batch a seed."""
    rows = []
    device = torch.device("cpu")
    with options.session(teacher, device) as session:
        start = time.perf_counter()
        if options.engine.compile is True and (problem := session.compile()) is not None:
            raise SystemExit(problem)
        compiling = time.perf_counter() - start
        for seed in seeds:
            plan = BatchPlan(0, 0, options.images, batch_seed(seed, 0))
            taken = 0

            def on_step(done: int, terms: Any) -> None:
                nonlocal taken
                taken = done

            start = time.perf_counter()
            dream = session.dream(plan, on_step)
            seconds = time.perf_counter() - start
            found = quality(dream.images, dream.labels, teacher, verifier)
            rows.append(
                {"steps": taken, "seconds": seconds, "compile_seconds": compiling, **vars(found)}
            )
    return rows, dream


COLUMNS = (
    "| settings | steps | R_feature | before clipping | teacher | verifier | seconds a batch "
    "| compiling, once |\n" + "|---" * 8 + "|"
)


def row(name: str, rows: list[dict[str, Any]]) -> str:
    """Write one line of the table: means over the batches."""
    seconds = mean(r["seconds"] for r in rows)
    compiling = rows[0].get("compile_seconds", 0.0)
    cells = [
        name,
        f"{mean(r['steps'] for r in rows):.0f}",
        f"{mean(r['r_feature'] for r in rows):.2f}",
        f"{mean(r['unclipped'] for r in rows):.2f}",
        f"{mean(r['teacher_accuracy'] for r in rows):.3f}",
        f"{mean(r['verifier_accuracy'] for r in rows):.3f}",
        f"{seconds:.1f}",
        f"{compiling:.0f}" if compiling > 1 else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="resnet20-12fca82f.th")
    parser.add_argument("--verifier", type=Path, required=True, help="resnet32-d509ac18.th")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--plain-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="one batch each")
    parser.add_argument("--presets", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="64 images, 200 plain steps, one seed")
    parser.add_argument("--pictures", type=Path, help="write a grid of each setting's dreams here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.plain_steps, options.seed = 64, 200, options.seed[:1]
    device = torch.device("cpu")
    precision = "bfloat16" if has_native_bfloat16(device) else "float32"
    teacher, verifier = cifar_checkpoint(options.teacher), cifar_checkpoint(options.verifier)
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"plain loop in float32, presets in {precision},")
    print(f"batch {options.batch}, {len(options.seed)} batches a preset\n\n{COLUMNS}", flush=True)
    results: dict[str, Any] = {}
    plain, best, labels = run_plain(options.batch, options.plain_steps, teacher, verifier)
    results["plain loop"] = plain
    pictures = {"plain loop": (best, labels)}
    seconds = plain[-1]["seconds"]
    for name, preset in presets(options.batch, options.plain_steps).items():
        if options.presets and not any(part in name for part in options.presets):
            continue
        for compiled in (False, True):
            long = preset.steps_per_batch > 200  # eager would tell nothing that the others do not
            if long and not compiled:
                continue
            title = f"{name}, {'compiled' if compiled else 'eager'}"
            made = replace(preset, engine=Engine(compile=compiled))
            seeds = options.seed[:1] if preset.steps_per_batch > 1000 else options.seed
            results[title], dream = run_preset(made, seeds, teacher, verifier)
            pictures[title] = (dream.images, dream.labels)
            print(row(title, results[title]), flush=True)
    # The plain loop's pixels leave the valid range, which costs it dearly when they are clipped:
    # it is held to what it has before that, everyone else to what is stored.
    aim = plain[-1]
    reached = {
        name: (mean(r["seconds"] for r in rows), rows[0]["compile_seconds"])
        for name, rows in results.items()
        if name != "plain loop"
        and mean(r["r_feature"] for r in rows) <= aim["unclipped"]
        and mean(r["verifier_accuracy"] for r in rows) >= aim["verifier_accuracy"]
    }
    print(
        f"\nAim: R_feature {aim['unclipped']:.2f}, verifier {aim['verifier_accuracy']:.3f}, after "
        f"{seconds:.0f} s of the plain loop."
    )
    if not reached:
        print("No preset reached both.")
    for name, (taken, compiling) in sorted(reached.items(), key=lambda item: item[1]):
        once = f", {seconds / (taken + compiling):.0f} with compiling" if compiling > 1 else ""
        print(f"- {name}: {taken:.1f} s, {seconds / taken:.0f} times as fast{once}")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, (images, classes) in pictures.items():
            file = "".join(c if c.isalnum() else "_" for c in name) + ".png"
            grid(teacher.card.to_stored(images), classes).save(options.pictures / file)
    if options.json:
        data = {"processor": processor_name(), "results": results}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
