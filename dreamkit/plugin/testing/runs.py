"""Checks of what is done with a network, and of what accompanies that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamkit.plugin.testing.tiny import (
    CLASSES,
    SIZE,
    expect,
    made,
    tiny_teacher,
    untouched,
    working,
)
from dreamkit.report.run_log import MemoryLog
from dreamkit.types import (
    Application,
    Exporter,
    Images,
    LatencyBackend,
    Outcome,
    QuantizationStep,
    Quantizer,
    RunContext,
    StoredImages,
    Synthesis,
    Timing,
    Tracker,
)


def check_application(
    entry: Application | type, folder: Path, images: Images | Synthesis | None = None
) -> None:
    """Check an application: finite metrics, a student that runs, and the teacher left as it was.

    Args:
        entry: the application.
        folder: an empty folder, such as pytest's ``tmp_path``.
        images: what it works on; 12 random ones of 3×8×8 in 4 classes by default.

    Raises:
        ContractError: it is not.
    """
    application, name = made("applications", entry)
    teacher, log = tiny_teacher(), MemoryLog()
    if images is None:
        images = StoredImages(_pixels(12), torch.arange(12) % CLASSES)
    context = RunContext(0, torch.device("cpu"), folder, log, _Clock())
    with untouched(teacher.model, name), working(f"{name} on a tiny network"):
        outcome = application.run(teacher, images, context)
    expect(
        isinstance(outcome, Outcome), f"{name} returned {type(outcome).__name__}, not an Outcome"
    )
    for key, value in log.metrics.items():
        expect(
            isinstance(value, int | float) and math.isfinite(value),
            f"{name}: the metric '{key}' should be a finite number (got {value!r})",
        )
    if outcome.student is not None:
        model, card = outcome.student.model, outcome.student.card
        expect(model is not teacher.model, f"{name} returned the teacher: make a copy of it")
        expect(not model.training, f"{name} returned a student in training mode: call eval()")
        with torch.no_grad(), working(f"{name}: its student on an image of {card.input_size}"):
            shape = tuple(model(torch.zeros(2, *card.input_size)).shape)
        wanted = (2, card.num_classes)
        expect(shape == wanted, f"{name}: its student returned {shape}, its card says {wanted}")


def check_exporter(entry: Exporter | type, folder: Path) -> None:
    """Check an exporter: a file that does what the network does, for any number of images.

    Args:
        entry: the exporter.
        folder: an empty folder, such as pytest's ``tmp_path``.

    Raises:
        ContractError: it is not.
    """
    exporter, name = made("exporters", entry)
    suffix = exporter.suffix
    expect(suffix.startswith("."), f"{name}.suffix should begin with a dot (got {suffix!r})")
    teacher = tiny_teacher()
    images = teacher.card.normalise(_pixels(5))
    for any_batch, count in ((False, 2), (True, 5)):
        path = folder / f"tiny-{any_batch}{suffix}"
        with untouched(teacher.model, name), working(f"{name} with any_batch={any_batch}"):
            exporter.write(teacher.model, images[:2], path, any_batch)
            expect(path.is_file(), f"{name}.write wrote no file")
            with torch.no_grad():
                found = exporter.load(path)(images[:count])
                right = teacher.model(images[:count])
        expect(
            found.shape == right.shape and torch.allclose(found, right, atol=1e-3),
            f"{name}: its file returns other outputs than the network",
        )


def check_quantizer(entry: Quantizer | type, folder: Path) -> None:
    """Check a quantizer: a file in float that does what the network does, and one in integers
    that runs, for any number of images.

    Args:
        entry: the quantizer.
        folder: an empty folder, such as pytest's ``tmp_path``.

    Raises:
        ContractError: it is not.
    """
    quantizer, name = made("quantizers", entry)
    suffix = quantizer.suffix
    expect(suffix.startswith("."), f"{name}.suffix should begin with a dot (got {suffix!r})")
    teacher, heard = tiny_teacher(), list[float]()
    images = teacher.card.normalise(_pixels(6))
    scratch = folder / "scratch"
    scratch.mkdir()
    step = QuantizationStep(
        model=teacher.model,
        batches=lambda: iter(images.split(4)),
        folder=scratch,
        note=lambda text: None,
        advance=heard.append,
    )
    with untouched(teacher.model, name), working(f"{name}.calibrate"), torch.no_grad():
        right = teacher.model(images)
        found = quantizer.calibrate(step)
    expect(
        all(0 <= share <= 1 for share in heard),
        f"{name} told of shares of its work outside [0, 1]: {heard}",
    )
    files = [folder / f"{kind}{suffix}" for kind in ("float", "int8", "kept")]
    with working(f"{name}: writing a file"):
        found.write_float(files[0])
        found.write(files[1])
        found.write(files[2], found.layers[:1])
    for path in files:
        expect(path.is_file(), f"{name} wrote no file {path.name}")
        for count in (6, 1):
            with working(f"{name}: running a file on {count} images"):
                outputs = quantizer.load(path, 1)(images[:count])
            expect(
                outputs.shape == right[:count].shape and bool(outputs.isfinite().all()),
                f"{name}: its file returns {tuple(outputs.shape)} or what is not finite",
            )
    with working(f"{name}: looking into the file"):
        outputs = quantizer.load(files[0])(images)
        found.look(files[1], images)
        json.dumps(dict(found.describe()))
    expect(
        torch.allclose(outputs, right, atol=1e-3),
        f"{name}: its file in float returns other outputs than the network",
    )


def check_tracker(entry: Tracker | type, folder: Path) -> None:
    """Check a tracker: it takes a run from its start to its end, and one that ends at once.

    Args:
        entry: the tracker.
        folder: an empty folder, such as pytest's ``tmp_path``.

    Raises:
        ContractError: it does not.
    """
    tracker, name = made("trackers", entry)
    with working(f"{name} in a run that ends before it begins"):
        tracker.close()
    for resumed in (False, True):
        with working(f"{name} in a run that {'goes on' if resumed else 'begins'}"):
            tracker.start(folder, {"name": "tiny"}, resumed)
            tracker.record("training", 1, {"loss": 0.5, "accuracy": None})
            if resumed:
                tracker.finish({"student.accuracy": 0.5})
    with working(f"{name}.close"):
        tracker.close()


def _pixels(count: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, *SIZE), generator=draws).to(torch.uint8)


class _Clock(LatencyBackend):
    """A target on which everything takes a millisecond."""

    batch_size = 1

    def describe(self) -> dict[str, str]:
        """Return what it is."""
        return {"device": "none"}

    def time(self, modules: Any) -> list[Timing]:
        """Return a millisecond for each."""
        return [Timing(1.0, 0.0) for _ in modules]
