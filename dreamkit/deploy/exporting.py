"""Exporting a run's student to a file that others run, and running that file to be sure of it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.deploy.students import load_student, load_unpruned
from dreamkit.errors import DreamkitError
from dreamkit.latency.onnx_runtime import OnnxSession, as_onnx
from dreamkit.latency.sampling import alternate
from dreamkit.store.dreams import MANIFEST, DreamStore
from dreamkit.types import RunContext, Timing
from dreamkit.wording import one_line, say

Format = Literal["onnx", "torch-export", "torchscript"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}
COMPARED = 64
"""Images that the file and the model are compared on."""
TOLERANCE = 1e-3
"""By how much outputs may differ, as a share of the largest: runtimes add in other orders."""
_WARMUP, _REPEATS = 3, 21


@dataclass(frozen=True)
class Exported:
    """A file that was exported, and what was measured with it.

    Args:
        path: the file.
        images: how many it was compared on.
        dreams: whether they were the run's dreams; else they were noise.
        agreement: share of them that file and model put into the same class.
        max_error: largest difference of an output.
        largest: largest output.
        latency: of one image in the format's runtime, of the student and of the network that it
            was pruned from.
    """

    path: Path
    images: int
    dreams: bool
    agreement: float
    max_error: float
    largest: float
    latency: dict[str, Timing]


def export_student(
    run_directory: Path,
    kind: Format,
    out: Path | None = None,
    batch_size: int | None = None,
    allow_builder: bool = False,
) -> Exported:
    """Export a run's student, run the file and compare it with the model.

    Args:
        run_directory: of a finished run, or its folder ``student``.
        kind: the file's format.
        out: the file; beside the student if None.
        batch_size: images that the file takes at once; any number if None.
        allow_builder: see ``load_student``.

    Raises:
        DreamkitError: the model cannot be exported, or the file does not do what the model does;
            then there is no file.
        ArtifactError: the student cannot be loaded.
    """
    folder = run_directory / RunContext.STUDENT
    if not folder.is_dir():
        folder = run_directory
    student = load_student(folder, allow_builder=allow_builder)
    card = student.card
    assert isinstance(card, Card)
    path = out or folder / f"model{SUFFIXES[kind]}"
    stored, dreams = _images(run_directory, card, batch_size or COMPARED)
    images = card.normalise(stored)
    if path.is_dir():
        raise DreamkitError(f"{path} is a folder: name the file itself with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            written = Path(scratch) / f"model{SUFFIXES[kind]}"
            found = _checked(student, kind, written, images, batch_size)
            unpruned = Path(scratch) / f"unpruned{SUFFIXES[kind]}"
            _write(load_unpruned(folder, allow_builder), kind, unpruned, images, batch_size)
            one = images[: batch_size or 1]
            calls = [_opened(kind, file, one) for file in (written, unpruned)]
            timings = alternate([partial(call, one) for call in calls], _WARMUP, _REPEATS)
            written.replace(path)
    except OSError as failure:
        raise DreamkitError(f"{path} cannot be written: {failure.strerror}") from failure
    agreement, error, largest = found
    latency = dict(zip(("student", "unpruned"), timings, strict=True))
    return Exported(path, len(images), dreams, agreement, error, largest, latency)


def _images(run_directory: Path, card: Card, count: int) -> tuple[Tensor, bool]:
    """Return stored images, the run's dreams where it has as many."""
    dreams = run_directory / RunContext.DREAMS
    if (dreams / MANIFEST).is_file():
        content = DreamStore(dreams).open(count)
        if len(content) >= count:
            return content.batch(range(count))[0], True
    noise = torch.rand(count, *card.input_size, generator=torch.Generator().manual_seed(0))
    return (255 * noise).to(torch.uint8), False


@torch.no_grad()
def _checked(
    student: nn.Module, kind: Format, path: Path, images: Tensor, batch_size: int | None
) -> tuple[float, float, float]:
    """Write a student and compare; return agreement, largest error and largest output."""
    _write(student, kind, path, images, batch_size)
    expected = student(images)
    found = _opened(kind, path, images)(images)
    error = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    same = (found.argmax(1) == expected.argmax(1)).float().mean()
    if not error <= TOLERANCE * largest:
        raise DreamkitError(
            f"the exported {kind} file does not do what the model does: outputs of up to "
            f"{largest:.3g} differ by up to {error:.3g}, and {float(same):.1%} of {len(images)} "
            "images are put into the same class; nothing was written. Try another --format"
        )
    return float(same), error, largest


def _write(
    model: nn.Module, kind: Format, path: Path, images: Tensor, batch_size: int | None
) -> None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporters' own future
            if kind == "onnx":
                path.write_bytes(as_onnx(model, images, any_batch=batch_size is None))
            elif kind == "torchscript":
                torch.jit.trace(model, images, check_trace=False).save(str(path))
            else:
                shapes = ({0: torch.export.Dim("batch")},) if batch_size is None else None
                program = torch.export.export(model, (images,), dynamic_shapes=shapes)
                torch.export.save(program, path)
    except DreamkitError:
        raise
    except Exception as error:  # exporters fail in as many ways as models can be written
        reason = one_line(error)
        raise DreamkitError(
            f"the model cannot be exported as {kind}: {reason}. Try --batch-size 1, or another "
            "--format"
        ) from error


def _opened(kind: Format, path: Path, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what runs a file."""
    if kind == "onnx":
        return OnnxSession(path, None, example).run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "torchscript":
            program = torch.jit.load(str(path))
        else:
            program = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        outputs: Tensor = program(images)
        return outputs

    return run


def show_exported(exported: Exported, console: Console) -> None:
    """Print what was written and measured."""
    images = f"{exported.images} {'of its dreams' if exported.dreams else 'images of noise'}"
    lines = [
        f"{exported.path}: on {images} it agrees with the model in {exported.agreement:.1%}, its "
        f"outputs of up to {exported.largest:.3g} differ by up to {exported.max_error:.2g}"
    ]
    lines += [
        f"{name}: {timing.median_ms:.3f} ms (interquartile range {timing.spread_ms:.3f} ms)"
        for name, timing in exported.latency.items()
    ]
    for line in lines:
        say(console, line)
