"""Exporting a model to a file that others run, and running that file to be sure of it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.evaluation.same_outputs import difference
from dreamkit.latency.sampling import alternate
from dreamkit.model_state import hide_extra_state, to_eval
from dreamkit.plugins import build_registries
from dreamkit.recipe import build_entry
from dreamkit.registry import Registries
from dreamkit.store.dreams import DreamStore, holds_dreams
from dreamkit.students import load_student, load_unpruned
from dreamkit.teachers.builders import call_builder, check_builder
from dreamkit.types import Exporter, RunContext, Timing
from dreamkit.wording import one_line, say

COMPARED = 64
"""Images that the file and the model are compared on."""
_COUNTS = (1, 3)
_WARMUP, _REPEATS = 3, 21


@dataclass(frozen=True)
class Exported:
    """A file that was exported, and what was measured with it.

    Args:
        path: the file.
        images: how many it was compared on.
        agreement: share of them that file and model put into the same class.
        max_error: largest difference of an output.
        largest: largest output.
        dreams: whether they were the run's dreams; else they were noise, or the caller's.
        latency: of one image in the format's runtime, of the student and of the network that it
            was pruned from.
    """

    path: Path
    images: int
    agreement: float
    max_error: float
    largest: float
    dreams: bool = False
    latency: dict[str, Timing] = field(default_factory=dict)


def export_model(
    model: nn.Module,
    card: Card | tuple[int, int, int],
    format: str,
    path: Path,
    batch_size: int | None = None,
    registries: Registries | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Export a model, run the file and compare it with the model; keep it if it does the same.

    Args:
        model: takes normalised images (N, C, H, W), returns outputs (N, K); it stays as it is.
        card: of the model, or its input size (channels, height, width).
        format: an entry of ``exporters``: ``onnx``, ``torch-export``, ``torchscript``, or of a
            plugin.
        path: the file; its folder is made.
        batch_size: images that the file takes at once; any number if None.
        registries: where the format is looked up; those of the installed plugins if None.
        images: normalised, to compare on: ``batch_size`` of them if that is given. Noise if None.

    Raises:
        DreamkitError: there is no such format, the model cannot be exported, or the file does not
            do what the model does; then there is no file.
    """
    exporter = find_exporter(format, registries)
    if images is None:
        images = _noise(card, batch_size or COMPARED)
    own = copied(model).cpu()
    to_eval(own)
    hide_extra_state(own)
    if path.is_dir():
        raise DreamkitError(f"{path} is a folder: name the file itself")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            written = Path(scratch) / f"model{exporter.suffix}"
            _write(exporter, format, own, written, images, batch_size)
            found = _compared(exporter, format, own, written, images)
            if batch_size is None:  # a file for any number is held to more than one
                for count in _COUNTS:
                    _compared(exporter, format, own, written, images[:count])
            written.replace(path)
    except OSError as failure:
        raise DreamkitError(f"{path} cannot be written: {failure.strerror}") from failure
    return replace(found, path=path)


def export_student(
    run_directory: Path,
    format: str,
    out: Path | None = None,
    batch_size: int | None = None,
    allow_builder: bool = False,
    builder: str | None = None,
    registries: Registries | None = None,
) -> Exported:
    """Export a run's student as ``export_model`` does, and time it beside what it was before.

    Args:
        run_directory: of a finished run, or its folder ``student``.
        format: as of ``export_model``.
        out: the file; beside the student if None.
        batch_size: as of ``export_model``.
        allow_builder: see ``load_student``.
        builder: ``package.module:function`` or ``path/to/file.py:function`` that returns the
            network before it was pruned, in place of the one that the student names.
        registries: as of ``export_model``.

    Raises:
        DreamkitError: as ``export_model`` does.
        ArtifactError: the student cannot be loaded.
    """
    folder = run_directory / RunContext.STUDENT
    if not folder.is_dir():
        folder = run_directory
    given = None
    if builder is not None:
        try:
            check_builder(builder)
        except OptionError as error:
            raise DreamkitError(f"builder: {error}") from error
        given = partial(call_builder, builder, {})
    student = load_student(folder, given, allow_builder)
    card, exporter = student.card, find_exporter(format, registries)
    assert isinstance(card, Card)
    path = out or folder / f"model{exporter.suffix}"
    dreams = _dreams(run_directory, card, batch_size or COMPARED)
    images = _noise(card, batch_size or COMPARED) if dreams is None else dreams
    found = export_model(student, card, format, path, batch_size, registries, images)
    with tempfile.TemporaryDirectory() as scratch:
        unpruned = Path(scratch) / f"unpruned{exporter.suffix}"
        model, one = load_unpruned(folder, given, allow_builder), images[: batch_size or 1]
        _write(exporter, format, model, unpruned, images, batch_size)
        calls = [partial(_opened(exporter, file), one) for file in (path, unpruned)]
        timings = alternate(calls, _WARMUP, _REPEATS)
    latency = dict(zip(("student", "unpruned"), timings, strict=True))
    return replace(found, dreams=dreams is not None, latency=latency)


def find_exporter(name: str, registries: Registries | None = None) -> Exporter:
    """Return a format by its name.

    Raises:
        DreamkitError: there is none; the message lists them.
    """
    entry: Exporter = build_entry(registries or build_registries(), "exporters", name, ("format",))
    return entry


def _noise(card: Card | tuple[int, int, int], count: int) -> Tensor:
    """Return normalised noise (N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    if not isinstance(card, Card):
        return torch.randn(count, *card, generator=generator)
    noise = torch.rand(count, *card.input_size, generator=generator)
    return card.normalise((255 * noise).to(torch.uint8))


def _dreams(run_directory: Path, card: Card, count: int) -> Tensor | None:
    """Return a run's dreams, normalised; None where it has not as many."""
    dreams = run_directory / RunContext.DREAMS
    if not holds_dreams(dreams):
        return None
    content = DreamStore(dreams).open(count)
    return card.normalise(content.batch(range(count))[0]) if len(content) >= count else None


@torch.no_grad()
def _compared(
    exporter: Exporter, name: str, model: nn.Module, path: Path, images: Tensor
) -> Exported:
    """Run a file beside the model that it was written from.

    Raises:
        DreamkitError: their outputs differ.
    """
    expected = model(images)
    try:
        found = _opened(exporter, path)(images)
    except Exception as failure:  # each runtime has errors of its own
        raise DreamkitError(
            f"the exported {name} file does not run on {len(images)} images: {one_line(failure)}; "
            "nothing was written. Try a batch size of 1, or another format"
        ) from failure
    differ = difference(found, expected)
    if not differ.is_rounding:
        raise DreamkitError(
            f"the exported {name} file does not do what the model does: {differ}; nothing was "
            "written. Try another format"
        )
    return Exported(path, differ.images, differ.agreement, differ.max_error, differ.largest)


def _write(
    exporter: Exporter,
    name: str,
    model: nn.Module,
    path: Path,
    images: Tensor,
    batch_size: int | None,
) -> None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporters' own future
            exporter.write(model, images, path, batch_size is None)
    except DreamkitError:
        raise
    except Exception as error:  # exporters fail in as many ways as models can be written
        reason = one_line(error)
        raise DreamkitError(
            f"the model cannot be exported as {name}: {reason}. Try a batch size of 1, or "
            "another format"
        ) from error


def _opened(exporter: Exporter, path: Path) -> Callable[[Tensor], Tensor]:
    """Return what runs a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.no_grad()(exporter.load(path))


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
