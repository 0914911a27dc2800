"""Time until another network knows the dreams: a plain loop, a rival, and dreamkit's default.

python benchmarks/time_to_accuracy.py --teacher lite0.yaml --verifier lite1.yaml --mct FOLDER
python benchmarks/time_to_accuracy.py --teacher ... --verifier ... --quick    # the mechanics

- plain loop: the paper's settings for ImageNet, which has 20,000 steps of them. It is one run,
  looked at now and then.
- MCT: Sony's Model Compression Toolkit, left out without --mct: a folder that
  pip install --target FOLDER 'model-compression-toolkit==2.6.*' has filled. It takes no labels: the
  classes that the teacher sees in its images count as asked for, which is easier: whatever both
  networks take them for is known. So the verifier's mean probability of the class stands beside it.
- dreamkit: what dreamkit.invert does by default.

Each number of steps of the last two is a run of its own, since their learning rates follow it. They
take turns, a batch each, and each is judged on what would be stored, in 8 bits a pixel. Seconds are
without judging and importing; dreamkit's are with its planning. Processor seconds leave out what
others on the machine take. What would take longer than --seconds is left out, as is a method's
longer run once one has failed. --json has every figure as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean

import torch
from given import NETWORK, default_settings, drawn_classes, given_network
from plain_loop import PAPER_IMAGENET, PlainLoop
from torch import Tensor, fx

from dreamkit.applications.judge import check_verifier
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.cross_model import observe
from dreamkit.latency.processor import processor_name
from dreamkit.report.figures import grid
from dreamkit.stages.batches import batch_plans
from dreamkit.types import StoredImages, Teacher

CPU = torch.device("cpu")
LEVELS = (0.8, 0.9)
"""Shares of the dreams that the verifier is to know."""
NORMALISATIONS: dict[tuple[tuple[float, ...], tuple[float, ...]], str] = {
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)): "keras_applications",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "torchvision",
}
"""Those that MCT knows, by mean and standard deviation."""


@dataclass(frozen=True)
class Batch:
    """A batch of normalised images, and what it took; no labels where no classes were asked for."""

    images: Tensor
    labels: Tensor | None
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Found:
    """What a batch is worth.

    Args:
        steps: that were taken.
        seconds: they took.
        processor_seconds: they took.
        teacher: share that it classifies as asked; None where nothing was asked for.
        verifier: share that it classifies so.
        confidence: the verifier's mean probability of the class.
        classes: how many different ones there are.
    """

    steps: int
    seconds: float
    processor_seconds: float
    teacher: float | None
    verifier: float
    confidence: float
    classes: int


class Failed(Exception):
    """A method made no images."""


Results = dict[str, dict[int, list[Found]]]
"""By method and steps, one of each seed."""
Methods = dict[str, tuple[Callable[[int], Batch], list[int]]]
"""What makes a batch in a number of steps, and the numbers of steps to take."""


def judged(
    batch: Batch, steps: int, teacher: Teacher, verifier: Teacher
) -> tuple[Found, StoredImages]:
    """Judge a batch as it would be stored."""
    stored = teacher.card.to_stored(batch.images)
    unknown = torch.zeros(len(stored), dtype=torch.int64)
    seen = observe(teacher, StoredImages(stored, unknown), CPU).logits.argmax(1)
    labels = seen if batch.labels is None else batch.labels
    content = StoredImages(stored, labels)
    own = None if batch.labels is None else float((seen == labels).float().mean())
    logits = observe(verifier, content, CPU).logits
    known = float((logits.argmax(1) == labels).float().mean())
    sure = float(logits.softmax(1)[range(len(labels)), labels].mean())
    times = (batch.seconds, batch.processor_seconds)
    return Found(steps, *times, own, known, sure, len(labels.unique())), content


class PlainRun:
    """The plain loop in a process of its own, where nothing of dreamkit's tuning reaches it."""

    def __init__(self, teacher: str, labels: Tensor, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, teacher, labels.tolist(), seed)
        self._process = context.Process(target=_plain_steps, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._labels, self._steps, self._times = labels, 0, (0.0, 0.0)

    def until(self, steps: int) -> Batch:
        """Go on to a number of steps, counted from the start."""
        self._connection.send(steps - self._steps)
        images, *times = self._connection.recv()
        self._steps = steps
        self._times = (self._times[0] + times[0], self._times[1] + times[1])
        return Batch(torch.tensor(images), self._labels, *self._times)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _plain_steps(connection: Connection, network: str, labels: list[int], seed: int) -> None:
    teacher = given_network(network)
    shape = (len(labels), *teacher.card.input_size)
    loop = PlainLoop(
        teacher.model,
        shape,
        teacher.card.num_classes,
        CPU,
        seed=seed,
        labels=torch.tensor(labels),
        **PAPER_IMAGENET,
    )
    while True:
        steps = connection.recv()
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loop.step()
        seconds, used = time.perf_counter() - start, time.process_time() - processor
        connection.send((loop.best.numpy(), seconds, used))


def by_dreamkit(teacher: Teacher, labels: Tensor, steps: int, seed: int) -> Batch:
    options = replace(
        default_settings(teacher, len(labels), len(labels), steps), labels=tuple(labels.tolist())
    )
    (plan,) = batch_plans(options.images, options.images, seed)
    start, processor = time.perf_counter(), time.process_time()
    with options.session(teacher, CPU) as session:
        session.prepare(options.images)
        dream = session.dream(plan, lambda step, terms: None)
    seconds, used = time.perf_counter() - start, time.process_time() - processor
    return Batch(dream.images, dream.labels, seconds, used)


def by_mct(folder: Path, teacher: Teacher, number: int, steps: int, seed: int) -> Batch:
    card = teacher.card
    normalisation = NORMALISATIONS[card.mean, card.std]
    with tempfile.TemporaryDirectory() as scratch:
        network, out = Path(scratch, "network.pt"), Path(scratch, "images.pt")
        torch.save(fx.symbolic_trace(teacher.model), network)
        size = [str(side) for side in card.input_size[1:]]
        numbers = {"--batch": number, "--steps": steps, "--seed": seed}
        words = [str(word) for pair in numbers.items() for word in pair]
        script = Path(__file__).with_name("mct_dreams.py")
        command = [sys.executable, str(script), str(network), str(out), "--size", *size, *words]
        done = subprocess.run(
            [*command, "--normalisation", normalisation],
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:  # a negative one is a signal: 9 where memory ran out
            raise Failed(f"exit status {done.returncode}: {done.stderr[-500:]}")
        images, seconds, used = torch.load(out, weights_only=True)
    return Batch(images, None, seconds, used)


@contextmanager
def runners(
    options: argparse.Namespace, teacher: Teacher, labels: Tensor, seed: int
) -> Iterator[Methods]:
    """Give the methods that are asked for; the plain loop goes on from call to call."""
    plain = PlainRun(options.teacher, labels, seed) if options.plain_steps else None

    def mct(steps: int) -> Batch:
        return by_mct(options.mct, teacher, len(labels), steps, seed)

    def dreamkit(steps: int) -> Batch:
        return by_dreamkit(teacher, labels, steps, seed)

    methods: Methods = {}
    if plain is not None:
        methods["plain loop"] = (plain.until, options.plain_steps)
    if options.mct is not None:
        methods["MCT"] = (mct, options.mct_steps)
    methods["dreamkit"] = (dreamkit, options.steps)
    try:
        yield methods
    finally:
        if plain is not None:
            plain.close()


def in_turn(methods: Methods) -> Iterator[tuple[str, Callable[[int], Batch], int]]:
    """Give every method's first number of steps, then their second ones, and so on."""
    for turn in range(max(len(steps) for _, steps in methods.values())):
        for name, (make, steps) in methods.items():
            if turn < len(steps):
                yield name, make, steps[turn]


def table(results: Results) -> str:
    """Write the results as Markdown: means over the seeds."""
    lines = [
        "| method | steps | seconds | processor seconds | teacher | verifier | its confidence "
        "| different classes |",
        "|---" * 8 + "|",
    ]
    for name, rows in results.items():
        for steps, found in rows.items():
            own = [one.teacher for one in found if one.teacher is not None]
            cells = [
                name,
                str(steps),
                f"{mean(one.seconds for one in found):.0f}",
                f"{mean(one.processor_seconds for one in found):.0f}",
                f"{mean(own):.3f}" if own else "",
                f"{mean(one.verifier for one in found):.3f}",
                f"{mean(one.confidence for one in found):.3f}",
                f"{mean(one.classes for one in found):.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reached(rows: dict[int, list[Found]], level: float, clock: str) -> float | None:
    """Return the least time with which a verifier knows so many; None if never."""
    enough = [found for found in rows.values() if mean(one.verifier for one in found) >= level]
    return min((_time(found, clock) for found in enough), default=None)


def _time(found: list[Found], clock: str) -> float:
    return mean(float(getattr(one, clock)) for one in found)


def conclusion(results: Results, clock: str) -> str:
    """Say when each method had the levels, and how much sooner dreamkit did.

    Args:
        results: of every method.
        clock: ``seconds`` or ``processor_seconds``.
    """
    lines = list[str]()
    for name, rows in results.items():
        best = max(mean(one.verifier for one in found) for found in rows.values())
        longest = max(_time(found, clock) for found in rows.values())
        for level in LEVELS:
            taken = reached(rows, level, clock)
            ours = reached(results["dreamkit"], level, clock)
            words = f"{taken:.0f} s" if taken is not None else f"not within {longest:.0f} s"
            if name != "dreamkit" and ours is not None:
                least = "" if taken is not None else "more than "
                words += f", dreamkit {least}{(taken or longest) / ours:.1f} times as fast"
            lines.append(f"- verifier {level}: {name} {words}")
        ours, taken = reached(results["dreamkit"], best, clock), reached(rows, best, clock)
        if name != "dreamkit" and ours is not None and taken is not None:
            lines.append(
                f"- {name}'s best, {best:.3f}: {taken:.0f} s; dreamkit has as much after "
                f"{ours:.0f} s, {taken / ours:.1f} times as fast"
            )
    return "\n".join(lines)


def write(results: Results, file: Path) -> None:
    """Write every figure as JSON."""
    figures = {
        name: {steps: [asdict(one) for one in found] for steps, found in rows.items()}
        for name, rows in results.items()
    }
    data = {"processor": processor_name(), "results": figures}
    file.write_text(json.dumps(data, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help=NETWORK)
    parser.add_argument("--verifier", required=True, help="another network of the same classes")
    parser.add_argument("--mct", type=Path, help="folder with MCT and what it needs but torch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 120, 240], help="of dreamkit")
    parser.add_argument("--plain-steps", type=int, nargs="*", default=[50, 100, 200, 400, 800])
    parser.add_argument("--mct-steps", type=int, nargs="*", default=[50, 100, 250, 500])
    parser.add_argument("--seconds", type=float, default=1800.0, help="what a run may take")
    parser.add_argument(
        "--clock",
        choices=["seconds", "processor_seconds"],
        default="seconds",
        help="what is compared; processor seconds where others use the machine too",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one batch of each each")
    parser.add_argument("--quick", action="store_true", help="4 images, 1 and 2 steps")
    parser.add_argument("--pictures", type=Path, help="write a grid of each batch here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if options.quick:
        options.batch = 4
        options.steps = options.plain_steps = options.mct_steps = [1, 2]
    for steps in (options.steps, options.plain_steps, options.mct_steps):
        steps.sort()
    return options


def main() -> None:
    options = _options()
    teacher, verifier = given_network(options.teacher), given_network(options.verifier)
    try:
        check_verifier(verifier, teacher)
    except DreamkitError as error:
        raise SystemExit(error.message) from error
    if options.mct is not None and (teacher.card.mean, teacher.card.std) not in NORMALISATIONS:
        raise SystemExit(f"--mct: it knows these normalisations alone: {list(NORMALISATIONS)}")
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"{teacher.card.name} judged by {verifier.card.name}, batches of {options.batch}")
    results: Results = {}
    for seed in options.seed:
        labels = torch.tensor(drawn_classes(teacher.card, options.batch, seed))
        with runners(options, teacher, labels, seed) as methods:
            failed = set[str]()
            for name, make, steps in in_turn(methods):
                if name in failed or any(
                    one.seconds / done * steps > options.seconds
                    for done, found in results.get(name, {}).items()
                    for one in found[-1:]
                ):
                    print(f"{name}, {steps} steps: left out", flush=True)
                    continue
                try:
                    batch = make(steps)
                except Failed as error:
                    print(f"{name}, {steps} steps: {error}", flush=True)
                    failed.add(name)
                    continue
                one, content = judged(batch, steps, teacher, verifier)
                results.setdefault(name, {}).setdefault(steps, []).append(one)
                told = f"{one.verifier:.3f}, {one.seconds:.0f} s ({one.processor_seconds:.0f} s)"
                print(f"seed {seed}, {name}, {steps} steps: verifier {told}", flush=True)
                if options.json:
                    write(results, options.json)
                if options.pictures:
                    options.pictures.mkdir(parents=True, exist_ok=True)
                    file = f"{name.replace(' ', '_')}-{steps}-{seed}.png"
                    grid(content.images, content.labels).save(options.pictures / file)
    print(f"\n{table(results)}\n\n{conclusion(results, options.clock)}")


if __name__ == "__main__":
    main()
