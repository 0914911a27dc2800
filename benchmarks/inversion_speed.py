"""Time an inversion step: dreamkit's engine against a plain loop written from the paper.

python benchmarks/inversion_speed.py                    # all networks; about 45 minutes on 2 cores
python benchmarks/inversion_speed.py --quick            # ResNet-20 alone
python benchmarks/inversion_speed.py --models resnet56

All variants of a network run in turn in one process, a few steps each, over and over; times are
medians. A plain loop has the allocator as other programs have it, and so has the engine in one row.
Weights are random, which changes no time. Compilation is timed with an empty cache. Peak memory is
measured in a process of its own for each variant; where one is compiled it includes what the
compiler left in memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from cifar_10 import random_resnet, settle_statistics
from plain_loop import PlainLoop, paper_settings

from dreamkit.card import Card
from dreamkit.evaluation.cost import count
from dreamkit.latency.processor import processor_name
from dreamkit.memory import peak_memory
from dreamkit.synthesizers.deepinversion import Inversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.types import BatchPlan, Teacher

STEPS = {"cpu": 5, "cuda": 40}
"""Steps that a variant takes before it is the next one's turn; enough to hide a batch's set-up."""
PLAIN = {"plain loop": False, "plain loop, frozen weights": True}


@dataclass(frozen=True)
class Case:
    """A network and its batch on each kind of device."""

    model: str
    cpu_batch: int
    cuda_batch: int
    size: int

    def teacher(self) -> Teacher:
        if self.model.startswith("resnet") and self.size == 32:
            return random_resnet(int(self.model.removeprefix("resnet")))
        model = timm.create_model(self.model, pretrained=False)
        settle_statistics(model, (3, self.size, self.size))
        card = Card(
            name=self.model,
            input_size=(3, self.size, self.size),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            num_classes=1000,
            origin="random weights",
            trained=False,
        )
        return Teacher(model, card, {})


CASES = {
    "resnet20": Case("resnet20", 256, 256, 32),
    "resnet56": Case("resnet56", 256, 256, 32),
    "resnet50": Case("resnet50", 8, 152, 224),
    "mobilenetv2_100": Case("mobilenetv2_100", 8, 152, 224),
    "tf_efficientnet_lite0": Case("tf_efficientnet_lite0", 32, 152, 224),
}
VARIANTS = {
    "float32, eager": Engine("float32", False),
    "float32, compiled": Engine("float32", True),
    "bfloat16, eager": Engine("bfloat16", False),
    "bfloat16, compiled": Engine("bfloat16", True),
}


MEASURED_MEMORY = ("plain loop", "float32, eager", "bfloat16, eager", "bfloat16, compiled")
FIRST = "float32, eager"
GIVEN_BACK = "float32, eager, freed memory given back"


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Let glibc give freed memory back, as in other programs, though a session is open."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    usual, kept = {-4: 65536, -3: 32 * 2**20, -1: 64 * 2**20}, {-4: 0, -1: -1}
    set_allocator(usual)
    try:
        yield
    finally:
        set_allocator(kept)


def set_allocator(values: dict[int, int]) -> None:
    """Set parameters of glibc's ``mallopt``, and give back what is free."""
    libc = ctypes.CDLL(None)
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)


def others(run: Callable[[], None]) -> Callable[[], None]:
    """Return what takes a turn with the allocator as other programs have it."""

    def turn() -> None:
        with memory_given_back():
            run()

    return turn


def plain_steps(case: Case, batch: int, device: torch.device, frozen: bool) -> Callable[[], None]:
    """Return what takes a turn of plain steps."""
    teacher = case.teacher()
    loop = PlainLoop(
        teacher.model,
        (batch, *teacher.card.input_size),
        teacher.card.num_classes,
        device,
        frozen=frozen,
    )

    def run() -> None:
        for _ in range(STEPS[device.type]):
            loop.step()

    return run


def engine_steps(session: Inversion, batch: int) -> Callable[[], None]:
    def run() -> None:
        session.dream(BatchPlan(0, 0, batch, 0), lambda *_: None)

    return run


def measure(case: Case, device: torch.device, repeats: int, seconds: float) -> dict[str, Any]:
    """Time every variant of one case, in turn."""
    batch = case.cuda_batch if device.type == "cuda" else case.cpu_batch
    turns = {
        name: others(plain_steps(case, batch, device, frozen)) for name, frozen in PLAIN.items()
    }
    compile_seconds: dict[str, float] = {}
    notes: list[str] = []
    with ExitStack() as stack:
        for name, engine in VARIANTS.items():
            teacher = case.teacher()
            teacher.model.to(device)
            options = replace(paper_settings(batch, STEPS[device.type]), engine=engine)
            session = stack.enter_context(options.session(teacher, device, note=notes.append))
            start = time.perf_counter()
            if engine.compile:
                problem = session.compile()
                if problem is not None:
                    notes.append(f"{name} is left out: {problem}")
                    continue
                compile_seconds[name] = time.perf_counter() - start
            run = engine_steps(session, batch)
            if name == FIRST and device.type == "cpu":
                turns[GIVEN_BACK] = others(run)
            turns[name] = run
        for run in turns.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in turns}
        start = time.perf_counter()
        for done in range(repeats):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            for name, run in turns.items():
                if name == FIRST:  # what was given back before is taken again
                    run()
                before = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - before) / STEPS[device.type])
        best = turns.get("bfloat16, compiled")
        shares = profile(best) if best is not None and device.type == "cpu" else {}
    macs = count(case.teacher().model, (3, case.size, case.size)).flops
    return {
        "model": case.model,
        "batch": batch,
        "seconds": {name: median(values) for name, values in times.items()},
        "spread": {
            name: (max(values) - min(values)) / median(values) for name, values in times.items()
        },
        "repeats": len(times["plain loop"]),
        "compile_seconds": compile_seconds,
        # Forward, and backward to the images alone: 2 passes of 2 operations a multiply-add.
        "flops_a_step": 4 * macs * batch,
        "profile": shares,
        "notes": notes,
    }


def memory(case: Case, variant: str, batch: int, device: torch.device) -> int:
    """Return the peak memory of a few steps, in bytes, the network and the images included."""
    with peak_memory(device) as whole:
        pass
    with ExitStack() as stack:
        if variant in PLAIN:
            run = plain_steps(case, batch, device, PLAIN[variant])
        else:
            teacher = case.teacher()
            teacher.model.to(device)
            options = replace(paper_settings(batch, STEPS[device.type]), engine=VARIANTS[variant])
            session = stack.enter_context(options.session(teacher, device))
            if VARIANTS[variant].compile and session.compile() is not None:
                raise SystemExit(1)
            run = engine_steps(session, batch)
        if sys.platform == "linux":  # what the allocator holds back of freed memory
            ctypes.CDLL(None).malloc_trim(0)
        with peak_memory(device) as peak:
            run()
    return peak.total - whole.start


def memory_apart(case: Case, variant: str, batch: int, device: torch.device) -> int | None:
    """Return ``memory`` of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", case.model, variant, str(batch)]
    command += ["--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def profile(run: Callable[[], None]) -> dict[str, float]:
    """Return the share of a step's processor time by kind of work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run()
    shares = {"convolutions": 0.0, "compiled loops": 0.0, "the rest": 0.0}
    for event in trace.key_averages():
        if "conv" in event.key:
            shares["convolutions"] += event.self_cpu_time_total
        elif "CompiledFxGraph" in event.key:
            shares["compiled loops"] += event.self_cpu_time_total
        else:
            shares["the rest"] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in shares.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of large square matrix products: the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def table(results: list[dict[str, Any]]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| network | batch | variant | ms a step | times as fast | compile s | break-even steps "
        "| peak memory, MB | GFLOP/s | of matmul peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        plain = result["seconds"]["plain loop"]
        for name, seconds in result["seconds"].items():
            compiling = result["compile_seconds"].get(name)
            eager = result["seconds"].get(name.replace("compiled", "eager"), plain)
            even = None
            if compiling is not None and eager > seconds:
                even = compiling / (eager - seconds)
            used = result["memory"].get(name)
            rate = result["flops_a_step"] / seconds
            peak = result["matmul_peak"]["bfloat16" if "bfloat16" in name else "float32"]
            cells = [
                f"{result['model']}, {result['size']}²",
                str(result["batch"]),
                name,
                f"{1000 * seconds:.0f}",
                f"{plain / seconds:.2f}",
                "" if compiling is None else f"{compiling:.0f}",
                "" if even is None else f"{even:.0f}",
                "" if used is None else f"{used / 2**20:.0f}",
                f"{rate / 1e9:.0f}",
                f"{rate / peak:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(result: dict[str, Any]) -> str:
    """Write where a step's time goes, what went wrong, and the peaks of memory."""
    lines = []
    if result["profile"]:
        seconds, peak = result["seconds"]["bfloat16, compiled"], result["matmul_peak"]["bfloat16"]
        rate = result["flops_a_step"] / (seconds * result["profile"]["convolutions"]) / peak
        lines.append(
            "where a compiled bfloat16 step goes: "
            + ", ".join(f"{kind} {part:.0%}" for kind, part in result["profile"].items())
            + f"; the convolutions run at {rate:.0%} of the matmul peak"
        )
    lines += [f"note: {note}" for note in result["notes"]]
    for batch, used in result["memory_by_batch"].items():
        plain = used["plain loop"]
        shares = [
            f"{variant} {amount / 2**20:.0f} MB ({amount / plain:.2f})"
            for variant, amount in used.items()
            if amount is not None and plain
        ]
        lines.append(f"peak memory at batch {batch}: " + ", ".join(shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=120, help="for the turns of one network")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 alone, 5 turns")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory-batch", type=int, default=32, help="of ResNet-50's second row")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    if options.memory_of:
        model, variant, batch = options.memory_of
        print(memory(CASES[model], variant, int(batch), device))
        return
    if options.quick:
        options.models, options.repeats = ["resnet20"], 5
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        print("float32 convolutions run in TF32, torch's default")
    print()
    peaks = {
        str(t).removeprefix("torch."): matmul_peak(device, t)
        for t in (torch.float32, torch.bfloat16)
    }
    print(", ".join(f"matmul peak {k}: {v / 1e9:.0f} GFLOP/s" for k, v in peaks.items()), "\n")
    results = []
    for model in options.models:
        case = CASES[model]
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            result = measure(case, device, options.repeats, options.seconds)
            batches = [result["batch"]]
            if model == "resnet50" and not options.quick:
                batches.append(options.memory_batch)
            found = {
                batch: {v: memory_apart(case, v, batch, device) for v in MEASURED_MEMORY}
                for batch in batches
            }
        result |= {"size": case.size, "matmul_peak": peaks, "memory": found[result["batch"]]}
        result["memory_by_batch"] = found
        results.append(result)
        print(table([result]))
        print(remarks(result), flush=True)
    print("\n" + table(results))
    if options.json:
        options.json.write_text(
            json.dumps({"processor": name, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
