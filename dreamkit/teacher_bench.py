"""The benchmark of teachers: what each costs to run and to invert, and how good its dreams are.

Every teacher is measured in a process of its own, which tells each figure as it is known and is
killed when its time is up: a teacher that hangs, crashes or takes all memory costs one row's
figures. The results are written after every teacher, so that a sweep can be interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import inspect
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.devices import choose_device
from dreamkit.errors import (
    DreamkitError,
    OptionError,
    TeacherMismatch,
    WeightsUnavailable,
    did_you_mean,
)
from dreamkit.evaluation.cost import count
from dreamkit.model_state import eval_mode
from dreamkit.plugins import build_registries
from dreamkit.registry import Registries, Term, UnknownEntry
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.report.figures import scatter
from dreamkit.report.tables import quantity
from dreamkit.stages.dreaming import batch_seed, format_duration, judge
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import BatchPlan, Dreamer, LatencyBackend, StoredImages, Teacher

Weights = Literal["default", "null"]
Tell = Callable[[dict[str, Any]], None]
"""Takes what became known: fields of ``TeacherRow``, a ``reason``, the ``stage`` that begins."""

SEED = 0
_LONGEST_REASON = 400
_EXIT_SECONDS = 5.0
_FIRST_TO_BE_KILLED = b"1000"
EXPLANATION = (
    "FLOPs count a multiply-add once; latency is of one image; images/s = batch size / (steps * "
    "seconds per step); peak memory is the process's on a CPU, torch's on a GPU"
)


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, so that rows of one file can be compared.

    Args:
        weights: ``null`` for random ones, whose dreams have no quality.
        batch_size: images inverted together.
        steps: of the inversion whose dreams are judged, and of images/s.
        verifier: ``SOURCE:MODEL``, which classifies the dreams of the others.
        device: where teachers are inverted.
        machine: what the latencies hold for.
    """

    weights: Weights
    batch_size: int
    steps: int
    verifier: str | None
    device: str
    machine: dict[str, str]

    def flat(self) -> dict[str, Any]:
        """Return every setting by name, the machine's too."""
        settings = dataclasses.asdict(self)
        machine: dict[str, str] = settings.pop("machine")
        return settings | {f"machine's {key}": value for key, value in machine.items()}


@dataclass
class TeacherRow:
    """What is known of one teacher; None where nothing is.

    Args:
        source: of ``teachers``.
        model: its name there.
        input_size: channels, height, width.
        bn_layers: layers with running statistics.
        params: parameters.
        flops: of one image, a multiply-add counted once.
        latency_ms: of inference with one image, the median.
        precision: of the network's arithmetic in the inversion.
        seconds_per_step: of the inversion of a batch.
        images_per_second: batch size / (steps × seconds per step).
        memory_bytes: peak of the inversion; of the process on a CPU, of torch on a GPU.
        r_feature: of the dreams, summed over layers.
        cross_model_accuracy: how often the verifier sees the class dreamed of, in [0, 1].
        reasons: why figures are missing.
        cut_short: whether there was no time for, or no weights to, the rest.
        seconds: spent on it.
        limit_seconds: it could have spent.
    """

    source: str
    model: str
    input_size: list[int] | None = None
    bn_layers: int | None = None
    params: int | None = None
    flops: int | None = None
    latency_ms: float | None = None
    precision: str | None = None
    seconds_per_step: float | None = None
    images_per_second: float | None = None
    memory_bytes: int | None = None
    r_feature: float | None = None
    cross_model_accuracy: float | None = None
    reasons: list[str] = field(default_factory=list)
    cut_short: Literal["time", "weights"] | None = None
    seconds: float = 0.0
    limit_seconds: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.source}/{self.model}"

    def take(self, known: dict[str, Any]) -> None:
        """Fill in what became known; a ``reason`` adds to the others."""
        for key, value in known.items():
            if key == "reason":
                self.reasons.append(value)
            else:
                setattr(self, key, value)

    def stands(self, limit_seconds: float) -> bool:
        """Whether measuring again would find no more: the limit is no higher, weights came."""
        if self.cut_short == "time":
            return limit_seconds <= self.limit_seconds
        return self.cut_short is None


@dataclass
class Results:
    """What the file holds: settings, and rows in the order in which they were measured."""

    settings: Settings
    teachers: list[TeacherRow] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One teacher to measure.

    Args:
        source: entry of ``teachers``.
        model: of that source.
        settings: what the figures depend on.
        verifier: the card of the teacher that judges its dreams.
        plugins: modules or files that its process loads.
    """

    source: str
    model: str
    settings: Settings
    verifier: Card | None = None
    plugins: tuple[str, ...] = ()


# --- what is to be measured -----------------------------------------------------------------


def resolve_settings(
    registries: Registries,
    weights: Weights,
    batch_size: int,
    steps: int,
    verifier: str | None,
    device: str,
) -> Settings:
    """Choose the device, and note what the figures hold for.

    Raises:
        DreamkitError: torch does not see the device, or there are no dreams for a verifier.
    """
    if verifier is not None and weights == "null":
        raise DreamkitError(
            "--verifier judges dreams, and those of random weights show nothing: leave it out, or "
            "--weights null"
        )
    place = choose_device(device)
    backend = _latency_backend(registries, place)
    return Settings(weights, batch_size, steps, verifier, str(place), backend.describe())


def _latency_backend(registries: Registries, device: torch.device) -> LatencyBackend:
    name = "torch-cuda" if device.type == "cuda" else "torch-cpu"
    backend: LatencyBackend = registries["latency_backends"].resolve(name)()
    return backend


def select(
    registries: Registries,
    sources: Sequence[str],
    globs: Sequence[str],
    weights: Weights,
    limit: int | None = None,
) -> list[tuple[str, str]]:
    """Return source and model of every teacher that a glob matches, in the order of its source.

    Args:
        registries: where sources stand.
        sources: entries of ``teachers``.
        globs: shell patterns of models; none is all. One with a dot is held against pretrained
            tags too.
        weights: with ``default``, only models that have weights.
        limit: at most so many, from the front.

    Raises:
        DreamkitError: a source is unknown, has no list of models or none with weights, or a glob
            matches none.
    """
    known = {
        source: _listing_source(registries, source).known_models(weights == "default")
        for source in dict.fromkeys(sources)
    }
    names = [name for listed in known.values() for name in listed]
    if not names:
        raise DreamkitError(
            f"no model of {', '.join(known)} comes with weights; --weights null measures what they "
            "cost with random ones"
        )
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise DreamkitError(
                f"no model of {', '.join(known)} matches '{glob}'{did_you_mean(glob, names)}"
            )
    chosen = [
        (source, name)
        for source, listed in known.items()
        for name in dict.fromkeys(listed)
        if any(_matches(name, glob) for glob in globs or ["*"])
    ]
    return chosen[:limit]


def _matches(name: str, glob: str) -> bool:
    # timm's tags name one architecture's weights, of which a sweep wants the default alone.
    return fnmatch.fnmatchcase(name, glob) and ("." in glob or "." not in name)


def _listing_source(registries: Registries, name: str) -> type[Any]:
    """Return a source of teachers that can list its models and needs only a model's name."""
    teachers = registries["teachers"]
    try:
        cls = teachers.resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    if not hasattr(cls, "known_models"):
        raise DreamkitError(f"the source '{name}' has no list of models; use timm or torchvision")
    return cls


def load_teacher(registries: Registries, source: str, model: str, weights: Weights) -> Teacher:
    """Return a teacher on the CPU; one that ships with its weights has them in any case.

    Raises:
        DreamkitError: there is no such source or model, or its weights do not come.
    """
    cls = _listing_source(registries, source)
    options: dict[str, Any] = {"model": model}
    if "weights" in inspect.signature(cls).parameters:
        options["weights"] = "default" if weights == "default" else None
    try:
        entry = cls(**options)
    except OptionError as error:
        raise DreamkitError(f"{source}:{model}: {error}") from error
    teacher: Teacher = entry.load(SEED)
    return teacher


def load_named(registries: Registries, option: str, named: str, weights: Weights) -> Teacher:
    """Return the teacher that ``SOURCE:MODEL`` names.

    Raises:
        DreamkitError: as ``load_teacher`` does, or it is written otherwise; ``option`` says where.
    """
    source, _, model = named.partition(":")
    if not model:
        raise DreamkitError(f"{option} {named}: write SOURCE:MODEL, e.g. torchvision:mobilenet_v2")
    return load_teacher(registries, source, model, weights)


# --- the sweep ------------------------------------------------------------------------------


def sweep(
    registries: Registries,
    selection: Sequence[tuple[str, str]],
    settings: Settings,
    path: Path,
    limit_seconds: float,
    console: Console,
    plugins: Sequence[str] = (),
) -> list[TeacherRow]:
    """Measure teachers one after another, writing what is known after each.

    Args:
        registries: where sources stand.
        selection: source and model of each; those that the file holds are left as they are,
            unless their weights did not come or they were given less time.
        settings: what the figures depend on.
        path: the file, which may be there already.
        limit_seconds: time for one teacher, the start of its process included.
        console: told of each teacher in one line.
        plugins: modules or files that made the registries what they are.

    Returns:
        The rows of the selection, in the order in which they were measured.

    Raises:
        DreamkitError: the file is damaged, of other settings or cannot be written, or the
            verifier cannot be had.
    """
    results = read_results(path, settings)
    rows = {(row.source, row.model): row for row in results.teachers}
    kept = {key for key in selection if key in rows and rows[key].stands(limit_seconds)}
    if kept:
        _say(console, f"resuming: {len(kept)} of {len(selection)} teachers kept from {path}")
    verifier = None
    if settings.verifier is not None and len(kept) < len(selection):
        # Here, so that no teacher's time is spent on a download or a mistake.
        judging = load_named(registries, "--verifier", settings.verifier, "default")
        check_outputs(judging)
        verifier = judging.card
        del judging
    _write(path, results)
    for number, (source, model) in enumerate(selection, 1):
        if (source, model) in kept:
            continue
        task = Task(source, model, settings, verifier, tuple(plugins))
        row = measure_in_child(task, limit_seconds)
        rows.pop((source, model), None)
        rows[source, model] = row
        results.teachers = list(rows.values())
        _write(path, results)
        _say(console, f"[{number}/{len(selection)}] {summary(row)}")
    return [row for key, row in rows.items() if key in set(selection)]


def read_results(path: Path, settings: Settings) -> Results:
    """Return what a file of these settings holds; of a file that is not there, nothing.

    Raises:
        DreamkitError: it is damaged, or of other settings.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Results(settings)
    except OSError as error:
        raise DreamkitError(f"{path} cannot be read: {error.strerror}") from error
    try:
        results = TypeAdapter(Results).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DreamkitError(
            f"{path} is damaged, or no benchmark of teachers "
            f"({f'{place}: ' if place else ''}{first['msg']}): move it away, or name another file "
            "with --json"
        ) from error
    here, there = settings.flat(), results.settings.flat()
    other = [
        f"{key} {there.get(key)} there, {here.get(key)} now"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if other:
        raise DreamkitError(
            f"{path} holds figures of other settings ({'; '.join(other)}): use the same again, or "
            "name another file with --json"
        )
    return results


def _write(path: Path, results: Results) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"{path.parent} cannot be made: {error.strerror}") from error
    write_json(path, dataclasses.asdict(results))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# --- one teacher in a process of its own ----------------------------------------------------


def measure_in_child(task: Task, limit_seconds: float) -> TeacherRow:
    """Measure a teacher in a fresh process, for so long; what it had told by then is kept."""
    row = TeacherRow(task.source, task.model, limit_seconds=limit_seconds)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    start = time.monotonic()
    arguments = (task, time.time() + limit_seconds, sender)
    process = context.Process(target=_work, args=arguments, daemon=True)
    with _deaf_to_interrupts():
        process.start()
    sender.close()  # the child has its own, and its end is seen only if there is no other
    stage, finished = "starting", False
    try:
        while not finished:
            if not receiver.poll(max(0.0, start + limit_seconds - time.monotonic())):
                spent = f"ran out of time ({limit_seconds:g} s) while {stage}"
                row.take({"reason": spent, "cut_short": "time"})
                break
            known: dict[str, Any] | None = receiver.recv()
            if known is None:
                finished = True
            else:
                stage = known.pop("stage", stage)
                row.take(known)
    except (EOFError, OSError):
        process.join(_EXIT_SECONDS)
        row.take({"reason": f"{_death(process.exitcode)} while {stage}"})
    finally:
        process.kill()
        process.join()
        receiver.close()
    row.seconds = round(time.monotonic() - start, 2)
    return row


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, so that a process started meanwhile does; its parent is who stops it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _death(exit_status: int | None) -> str:
    if exit_status is None or exit_status >= 0:
        return f"its process ended with status {exit_status}"
    name = signal.Signals(-exit_status).name
    likely = ", most likely for lack of memory," if name == "SIGKILL" else ""
    return f"its process was ended by {name}{likely}"


def _work(task: Task, deadline: float, sender: Connection) -> None:
    """Do a child's work: measure, tell, and say that this was all."""
    with contextlib.suppress(OSError):  # only Linux has it: what takes all memory goes first
        Path("/proc/self/oom_score_adj").write_bytes(_FIRST_TO_BE_KILLED)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' warnings and download bars would tear the lines apart
        os.dup2(silence, stream)
    measure(task, deadline, sender.send)
    sender.send(None)


# --- the measurement ------------------------------------------------------------------------


def measure(task: Task, deadline: float, tell: Tell) -> None:
    """Measure a teacher, telling every figure as it is known, and of what fails the reason.

    Args:
        task: the teacher.
        deadline: by ``time.time()``; no dreaming is begun that would not end before.
        tell: takes what became known.
    """
    registries, settings = build_registries(task.plugins), task.settings
    tell({"stage": "loading it"})
    try:
        teacher = load_teacher(registries, task.source, task.model, settings.weights)
        model, card = teacher.model, teacher.card
        tell({"input_size": list(card.input_size), "bn_layers": len(batch_norm_layers(model))})
        tell({"params": sum(p.numel() for p in model.parameters())})
        check_outputs(teacher)
    except Exception as error:  # the model's own code may raise anything
        cut_short = "weights" if isinstance(error, WeightsUnavailable) else None
        tell({"reason": explain(error), "cut_short": cut_short})
        return
    device = torch.device(settings.device)
    with _explained(tell, "counting its FLOPs"):
        tell({"flops": count(model, card.input_size).flops})
    with _explained(tell, "timing its inference"):
        image = torch.zeros(1, *card.input_size)
        (timing,) = _latency_backend(registries, device).time([(model, image)])
        tell({"latency_ms": timing.median_ms})
    with _explained(tell, "inverting it"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model.to(device)
        with inversion(settings).session(teacher, device) as dreamer:
            dreams = _invert(task, teacher, dreamer, deadline, tell)
        if dreams is not None and task.verifier is not None:
            tell({"stage": "having its dreams judged"})
            tell(_verified(registries, task.verifier, settings, dreams, teacher))


def inversion(settings: Settings) -> DeepInversion:
    """Return the inversion that every teacher gets: the flagship recipe's, at one resolution."""
    return DeepInversion(
        images=settings.batch_size,
        batch_size=settings.batch_size,
        regularizers=(
            Term("tv", 1e-4, TotalVariation()),
            Term("bn_feature", 1e-2, BNFeature(first_layer_scale=10)),
        ),
        stages=(Stage(settings.steps),),
        lr=0.2,
        betas=(0.5, 0.9),
        schedule="cosine",
        clip=True,
        engine=Engine(compile=False),
    )


def _invert(
    task: Task, teacher: Teacher, dreamer: Dreamer, deadline: float, tell: Tell
) -> StoredImages | None:
    """Time an inversion and, where it has a meaning and there is time, dream a batch."""
    settings = task.settings
    cost = dreamer.prepare(dreamer.batch_size)
    tell(
        {
            "seconds_per_step": cost.seconds / settings.steps,
            "images_per_second": dreamer.batch_size / cost.seconds,
            "memory_bytes": cost.memory_bytes,
            "precision": dreamer.choices["precision"],
        }
    )
    if settings.weights == "null":
        return None
    left = deadline - time.time()
    if cost.seconds > left:
        reason = (
            f"dreaming {settings.steps} steps takes about {format_duration(cost.seconds)}, and "
            f"{format_duration(max(0.0, left))} of its time is left"
        )
        tell({"reason": reason, "cut_short": "time"})
        return None
    tell({"stage": f"dreaming {settings.steps} steps"})
    dream = dreamer.dream(
        BatchPlan(0, 0, dreamer.batch_size, batch_seed(SEED, 0)), lambda step, terms: None
    )
    dreams, by_layer = judge(dream, teacher)
    r_feature = sum(by_layer.values())
    if not math.isfinite(r_feature):
        raise DreamkitError("R_feature of its dreams is not finite")
    tell({"r_feature": r_feature})
    return dreams


@torch.no_grad()
def _verified(
    registries: Registries,
    card: Card,
    settings: Settings,
    dreams: StoredImages,
    teacher: Teacher,
) -> dict[str, Any]:
    """Return how often the verifier sees what was dreamed of, or the reason why it cannot tell."""
    assert settings.verifier is not None
    reason = None
    if card.weights_sha256 == teacher.card.weights_sha256:
        reason = "the verifier is this teacher"
    elif card.num_classes != teacher.card.num_classes:
        reason = f"the verifier has {card.num_classes} classes, not {teacher.card.num_classes}"
    elif card.input_size[0] != teacher.card.input_size[0]:
        reason = f"the verifier takes {card.input_size[0]} channels"
    if reason is not None:
        return {"reason": f"no cross-model accuracy: {reason}"}
    device = torch.device(settings.device)
    verifier = load_named(registries, "--verifier", settings.verifier, "default")
    verifier.model.to(device)
    images = dreams.images.to(device).float()
    if images.shape[2:] != card.input_size[1:]:
        images = F.interpolate(images, card.input_size[1:], mode="bilinear", antialias=True)
    with eval_mode(verifier.model):
        seen = verifier.model(card.normalise(images)).argmax(1).cpu()
    return {"cross_model_accuracy": float((seen == dreams.labels).float().mean())}


@contextlib.contextmanager
def _explained(tell: Tell, stage: str) -> Iterator[None]:
    """Tell that a stage begins and, where it fails, the reason: the next one may do."""
    tell({"stage": stage})
    try:
        yield
    except Exception as error:  # the model's own code may raise anything
        known = isinstance(error, DreamkitError)
        tell({"reason": explain(error) if known else f"{stage}: {explain(error)}"})


def explain(error: Exception) -> str:
    """Return an error as a reason, in one line."""
    # What follows the first sentence, or line, is advice to the writer of a recipe.
    if isinstance(error, TeacherMismatch):
        text = error.message.partition(". ")[0]
    elif isinstance(error, WeightsUnavailable):
        text = error.message.partition("\n")[0]
    elif isinstance(error, DreamkitError):
        text = error.message
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        text = f"out of memory ({error})"
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split()).removesuffix(".")[:_LONGEST_REASON]


# --- what is shown --------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("bn_layers", "BN\nlayers", "{} BN layers", str),
    ("params", "params", "{} parameters", quantity),
    ("flops", "FLOPs", "{} FLOPs", quantity),
    ("latency_ms", "latency\nms", "{} ms", "{:.3g}".format),
    ("seconds_per_step", "s/step", "{} s/step", "{:.3g}".format),
    ("images_per_second", "images\n/s", "{} images/s", "{:.3g}".format),
    ("memory_bytes", "peak\nGB", "{} GB", lambda value: f"{value / 2**30:.2f}"),
    ("r_feature", "R_\nfeature", "R_feature {}", "{:.4g}".format),
    ("cross_model_accuracy", "cross-\nmodel", "cross-model accuracy {}", "{:.3f}".format),
)
"""Field, title of its column, how a line says it, and how it is written."""


def summary(row: TeacherRow) -> str:
    """Return a row as one line."""
    figures = [
        said.format(write(getattr(row, key)))
        for key, _, said, write in _COLUMNS
        if getattr(row, key) is not None
    ]
    parts = [part for part in (", ".join(figures), "; ".join(row.reasons)) if part]
    return f"{row.name}: {'; '.join(parts)}"


def show(rows: Sequence[TeacherRow], settings: Settings, console: Console) -> None:
    """Print a table of rows, without columns that nothing stands in, and why figures are missing.

    The reasons stand below the table: beside it they would leave the figures no room.
    """
    columns = [c for c in _COLUMNS if any(getattr(row, c[0]) is not None for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("teacher", overflow="fold")
    for _, title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [(write, getattr(row, key)) for key, _, _, write in columns]
        cells = ["" if value is None else write(value) for write, value in values]
        table.add_row(escape(row.name), *cells)
    console.print(table)
    for row in rows:
        if row.reasons:
            _say(console, f"{row.name}: {'; '.join(row.reasons)}")
    how = f"batch size {settings.batch_size}, {settings.steps} steps, on {settings.device}"
    _say(console, f"{how}; {EXPLANATION}")


def draw(path: Path, settings: Settings) -> Path | None:
    """Draw cost against quality of every row of a file, as an SVG file beside it.

    Cost is seconds per image. Quality is cross-model accuracy where any is known, else R_feature;
    where neither is, the size of the teacher takes its place: FLOPs, else parameters.

    Returns:
        The picture; None where no row has both.
    """
    rows = read_results(path, settings).teachers
    for key, title in (
        ("cross_model_accuracy", "cross-model accuracy (higher is better)"),
        ("r_feature", "R_feature (lower is better)"),
        ("flops", "FLOPs of an image (quality is not known)"),
        ("params", "parameters (quality is not known)"),
    ):
        points: dict[str, dict[str, tuple[float, float]]] = {}
        for row in rows:
            value = getattr(row, key)
            if value is not None and row.images_per_second:
                group = points.setdefault(row.source, {})
                group[row.model] = (1 / row.images_per_second, value)
        if points:
            cost = f"seconds per image (batches of {settings.batch_size}, {settings.steps} steps)"
            picture = path.with_suffix(".svg")
            write_atomically(picture, scatter(points, cost, title).encode())
            return picture
    return None
