"""What the functions of the library return: one class a function, numbers and notes in all."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from dreamkit.api.networks import recipe_entry
from dreamkit.api.session import Session, plain
from dreamkit.card import Card
from dreamkit.errors import ArtifactError, import_extra
from dreamkit.model_state import tensors_of, to_eval
from dreamkit.pruning.pattern import checked_patterns
from dreamkit.report.notebook import as_html, as_text
from dreamkit.stages.saving import save_student
from dreamkit.store.artifact import SPECIFICATION
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.teachers.provenance import tell
from dreamkit.types import Quantizer, RunFinished, Teacher
from dreamkit.version import __version__

_PACKAGES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True, repr=False, kw_only=True)
class Result:
    """What every function returns.

    Args:
        metrics: dotted names, those of ``report.json``, to numbers: accuracies in [0, 1],
            latencies in ms, FLOPs of one image with a multiply-add counted once.
        history: the records of every stage, in order: ``{"stage": ..., "step": ..., ...}``.
        notes: what you should know, as a run would print it.
        failures: what was asked for and not reached.
        details: more about what was done, as in ``report.json``.
        settings: the options, as a recipe has them.
        seed: of everything random.
        device: that it was made on.
        seconds: it took.
        versions: of the packages that made it.
    """

    metrics: Mapping[str, float]
    history: list[dict[str, Any]]
    notes: list[str]
    failures: list[str]
    details: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    device: str
    seconds: float
    versions: Mapping[str, str]

    def __repr__(self) -> str:
        return as_text(type(self).__name__, self._report(), self.seconds)

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._report(), self.seconds)

    def _report(self) -> dict[str, Any]:
        return {
            "metrics": dict(self.metrics),
            "details": dict(self.details),
            "notes": self.notes,
            "failures": self.failures,
        }

    def to_frame(self) -> Any:
        """Return the history as a ``pandas.DataFrame`` (extra ``notebook``)."""
        return import_extra("pandas", "notebook").DataFrame(self.history)

    def to_recipe(self, name: str = "from_notebook") -> str:
        """Return the recipe, as YAML, that does the same from the command line.

        Where a network or images live in this program alone, the recipe says what to fill in.
        """
        recipe = {"name": name, "seed": self.seed, **self.settings}
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, repr=False, kw_only=True)
class StudentResult(Result):
    """A network that was made, and how.

    Args:
        model: in eval mode, on the CPU. It takes normalised images (N, C, H, W); its ``card`` has
            size, mean, std and class names, and normalises them.
        card: the same card.
        teacher: the student as the rooms below know it.
    """

    model: nn.Module
    card: Card
    teacher: Teacher = field(repr=False)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the student as a run does, without pickle; ``dreamkit.load_student`` reads it.

        Args:
            folder: is made where it is not there.
            overwrite: take the place of a student that it holds.

        Returns:
            The folder.

        Raises:
            ArtifactError: the folder holds a student already, or something else.
        """
        held = (Path(folder) / SPECIFICATION).exists()
        if held and not overwrite:
            raise ArtifactError(f"{folder} holds a student already: give overwrite=True")
        if not held and Path(folder).is_dir() and any(Path(folder).iterdir()):
            raise ArtifactError(f"{folder} is not empty, and holds no student: choose a new folder")
        save_student(Path(folder), replace(self.teacher, model=self.model, card=self.card))
        return Path(folder)

    def export(self, path: str | Path, format: str = "onnx", batch_size: int | None = None) -> Path:
        """Export the student, run the file, and keep it only if it does what the model does.

        Args:
            path: of the file.
            format: ``onnx`` (extra ``onnx``), ``torch-export``, ``torchscript`` or a plugin's.
            batch_size: images that it takes at once; None takes any number.

        Returns:
            The file.

        Raises:
            DreamkitError: it cannot be exported, or the file does something else.
        """
        from dreamkit.deploy.exporting import export_model  # onnx's packages are an extra

        export_model(self.model, self.card, format, Path(path), batch_size)
        return Path(path)


@dataclass(frozen=True, repr=False, kw_only=True)
class Pruned(StudentResult):
    """A network with fewer channels.

    Args:
        skipped: what was left alone, and why: ``{"group": ..., "reason": ...}``.
    """

    skipped: list[dict[str, str]]


@dataclass(frozen=True, repr=False, kw_only=True)
class Distilled(StudentResult):
    """A student that was taught from scratch."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Recovered(StudentResult):
    """A network with fewer weights that are not zero."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Extended(StudentResult):
    """A network that learnt more classes."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Quantized(Result):
    """A network in integers, as a file.

    Args:
        file: what is in it.
        file_name: what it is called, as ``model.int8.onnx``.
        card: of the network: size, mean, std and class names; it normalises images.
        about: what the JSON beside the file says.
        quantizer: that runs it.
        student: in float, where ``after`` made one first.
    """

    file: bytes = field(repr=False)
    file_name: str
    card: Card
    about: Mapping[str, Any]
    quantizer: Quantizer = field(repr=False)
    student: StudentResult | None = field(default=None, repr=False)

    @property
    def noise(self) -> dict[str, float]:
        """The signal-to-noise ratio of every layer's output in dB, the worst first."""
        return dict(self.about["noise_db"])

    def load(self, threads: int | None = None) -> Callable[[Tensor], Tensor]:
        """Return what runs the file: normalised images (N, C, H, W) on the CPU to logits (N, K).

        Args:
            threads: that it runs on; None leaves the choice to the runtime.
        """
        with tempfile.TemporaryDirectory(prefix="dreamkit-") as folder:
            path = Path(folder) / self.file_name
            path.write_bytes(self.file)
            return self.quantizer.load(path, threads)

    def save(self, folder: str | Path) -> Path:
        """Write the file, and the JSON that says what it is, into a folder; return the file.

        Args:
            folder: is made where it is not there; files of these names are written over.

        Raises:
            DreamkitError: it cannot be written.
        """
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{folder} cannot be made: {error.strerror}") from error
        path = place / self.file_name
        write_atomically(path, self.file)
        write_json(path.with_suffix(".json"), self.about)
        return path


@dataclass(frozen=True, repr=False, kw_only=True)
class Judgement(Result):
    """What other networks see in images.

    Args:
        verifiers: of each its name, card, layer and features; its numbers are in ``metrics``.
    """

    verifiers: list[dict[str, Any]]


def described(work: Session, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that all results share, as they are at the end of a call."""
    log = work.log
    history = [
        {"stage": stage, "step": step, **numbers}
        for stage, steps in log.records.items()
        for step, numbers in sorted(steps.items())
    ]
    versions = {"dreamkit": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    made = {
        "metrics": dict(sorted(log.metrics.items())),
        "history": history,
        "notes": list(log.notes),
        "failures": list(log.failures),
        "details": dict(log.details),
        "settings": plain({"teacher": recipe_entry(work.teacher), **settings, **work.reported}),
        "seed": work.context.seed,
        "device": str(work.context.device),
        "seconds": time.perf_counter() - work.started,
        "versions": versions,
    }
    log.emit(RunFinished(report=made))
    return made


def student_fields(student: Teacher) -> dict[str, Any]:
    """Return the fields of a result that has a student: it is on the CPU, and knows its card."""
    model = student.model.cpu()
    to_eval(model)
    for parameter in model.parameters():
        parameter.grad = None
    record = checked_patterns(student.pruning_record, tensors_of(model))
    student = replace(student, pruning_record=record)
    tell(model, student.card, student.builder, record)
    return {"model": model, "card": student.card, "teacher": student}
