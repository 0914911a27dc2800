"""What the teachers' benchmark knows of each teacher, and the file that it is kept in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from dreamkit.errors import DreamkitError
from dreamkit.store.atomic import write_json
from dreamkit.teachers.named import Weights


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
        statistics_distance: of the dreams from training, as a multiple of chance.
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
    statistics_distance: float | None = None
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


def write_results(path: Path, results: Results) -> None:
    """Write the file whole, making its folder.

    Raises:
        DreamkitError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"{path.parent} cannot be made: {error.strerror}") from error
    write_json(path, dataclasses.asdict(results))
