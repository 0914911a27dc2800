"""Quantising a network: calibrated, run before it is kept, and held against float."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.evaluation.same_outputs import difference
from dreamkit.latency.sampling import alternate
from dreamkit.model_state import hide_extra_state, to_eval
from dreamkit.seeds import stream
from dreamkit.stages.samples import LEAST, Parts
from dreamkit.training.batches import Subset, in_order
from dreamkit.types import (
    Images,
    Quantization,
    QuantizationStep,
    Quantizer,
    RunContext,
    Teacher,
    Timing,
)
from dreamkit.wording import one_line

COMPARED = 512
"""Images that a file is compared with float on, at the most."""
BATCH = 32
"""Images of a calibration batch, and of those that files are compared on."""
NOISE = 0.2
"""Neighbouring pixels of noise correlate by less, those of photographs and dreams by more."""
_WARMUP, _REPEATS = 2, 11
_WARMUP_OF_MANY, _REPEATS_OF_MANY = 0, 3


class FileNetwork(nn.Module):
    """A file in the place of a network: normalised images (N, C, H, W) to outputs (N, K).

    Args:
        run: what runs it, on the CPU.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs, a few images at a time: a runtime keeps what it once needed."""
        parts = [self._run(part) for part in images.cpu().split(BATCH)]
        return torch.cat(parts).to(images.device)


def calibration_parts(images: Images, count: int, seed: int) -> Parts:
    """Return images to calibrate on, and others that files are compared with float on.

    Of few images half are kept for comparing; of fewer than ``2 * LEAST`` none.

    Args:
        images: all that there are.
        count: to calibrate on, at the most.
        seed: the run's.
    """
    order = torch.randperm(len(images), generator=stream(seed, "calibration")).tolist()
    apart = len(images) >= 2 * LEAST
    fitted = order[: min(count, len(images) // 2) if apart else count]
    compared = order[len(fitted) :] if apart else order
    return Parts(Subset(images, fitted), Subset(images, sorted(compared[:COMPARED])), apart)


def training_parts(images: Images, seed: int) -> Parts:
    """Return images to train in integers on, and a quarter that files are compared with float on.

    Of fewer than ``4 * LEAST`` none are kept for comparing.

    Args:
        images: all that there are.
        seed: the run's.
    """
    order = torch.randperm(len(images), generator=stream(seed, "calibration")).tolist()
    held = min(COMPARED, len(images) // 4)
    apart = held >= LEAST
    fitted, compared = (order[held:], order[:held]) if apart else (order, order[:COMPARED])
    return Parts(Subset(images, fitted), Subset(images, sorted(compared)), apart)


def hash_images(images: Images) -> str:
    """Return the SHA-256 of stored images, in order."""
    digest = hashlib.sha256()
    for stored, _ in in_order(images, BATCH):
        digest.update(stored.contiguous().numpy().tobytes())
    return digest.hexdigest()


def neighbour_correlation(images: Images) -> float:
    """Return how far neighbouring pixels of a row correlate, in [-1, 1]: 0 of noise."""
    stored, _ = images.batch(range(min(len(images), BATCH)))
    pixels = stored.double()
    left, right = pixels[..., :-1].flatten(1), pixels[..., 1:].flatten(1)
    left, right = left - left.mean(1, True), right - right.mean(1, True)
    scale = (left.square().sum(1) * right.square().sum(1)).sqrt().clamp(min=1e-9)
    return float(((left * right).sum(1) / scale).mean())


@dataclass(frozen=True)
class Workbench:
    """A network, a quantizer and a folder for files.

    Args:
        teacher: the network in float.
        quantizer: how it is written.
        quantization: the network with its ranges.
        folder: of files that go with the work.
        calibration: images that the ranges are of.
        context: the run's.
    """

    teacher: Teacher
    quantizer: Quantizer
    quantization: Quantization
    folder: Path
    calibration: Images
    context: RunContext

    @property
    def card(self) -> Card:
        """The network's."""
        return self.teacher.card

    @property
    def float_file(self) -> Path:
        """The network in float, for the same runtime."""
        return self.folder / f"float{self.quantizer.suffix}"

    def write(self, keep_float: Sequence[str], name: str = "model") -> Path:
        """Write the file in integers and run it.

        Raises:
            DreamkitError: it cannot be written, or what is written does not run.
        """
        path = self.folder / f"{name}{self.quantizer.suffix}"
        with told_plainly():
            self.quantization.write(path, keep_float)
            outputs = self.quantizer.load(path, 1)(self.first(2))
        if outputs.shape != (2, self.card.num_classes) or not outputs.isfinite().all():
            raise DreamkitError(
                f"the file in integers returns {tuple(outputs.shape)} for 2 images, or what is not "
                f"finite, and the network (2, {self.card.num_classes}); nothing was written"
            )
        return path

    def first(self, count: int) -> Tensor:
        """Return the first calibration images, normalised; the last again where there are fewer."""
        last = len(self.calibration) - 1
        stored, _ = self.calibration.batch([min(number, last) for number in range(count)])
        return self.card.normalise(stored)

    def logits(self, path: Path, images: Images, exact: bool = True) -> Tensor:
        """Return the outputs (N, K) of a file, without saturation unless that is asked for."""
        run = FileNetwork(self.quantizer.load(path, None, exact))
        parts = [run(self.card.normalise(stored)) for stored, _ in in_order(images, BATCH)]
        return torch.cat(parts)

    def times(self, files: Sequence[Path], batch_size: int, threads: int | None) -> list[Timing]:
        """Time files in turn, on the first rank; all are told."""
        found: list[Timing] = []
        if distributed.is_first():
            images = self.first(1).expand(batch_size, *self.card.input_size).contiguous()
            runs = [self.quantizer.load(file, threads) for file in files]
            calls = [partial(run, images) for run in runs]
            many = batch_size > 1
            warmup = _WARMUP_OF_MANY if many else _WARMUP
            found = alternate(calls, warmup, _REPEATS_OF_MANY if many else _REPEATS)
        return distributed.broadcast(found)


def calibrated(
    teacher: Teacher, quantizer: Quantizer, calibration: Images, folder: Path, context: RunContext
) -> Workbench:
    """Export a network, take its ranges, and see that the file in float does what it does.

    Args:
        teacher: the network; it stays as it is.
        quantizer: how it is written.
        calibration: images that the ranges are of.
        folder: for files, empty.
        context: the run's.

    Raises:
        DreamkitError: the network cannot be exported or quantised, or its file does something else.
    """
    own = copied(teacher.model).cpu()
    to_eval(own)
    hide_extra_state(own)

    def batches() -> Iterator[Tensor]:
        for stored, _ in in_order(calibration, BATCH):
            yield teacher.card.normalise(stored)

    with context.log.progress("calibrating", 100) as advance, told_plainly(), torch.no_grad():
        step = QuantizationStep(
            model=own,
            batches=batches,
            folder=folder,
            note=context.log.note,
            advance=lambda share: advance(round(100 * share)),
        )
        quantization = quantizer.calibrate(step)
    bench = Workbench(teacher, quantizer, quantization, folder, calibration, context)
    with told_plainly(), torch.no_grad():
        quantization.write_float(bench.float_file)
        images = bench.first(min(BATCH, len(calibration)))
        differ = difference(quantizer.load(bench.float_file)(images), own(images))
    if not differ.is_rounding:
        raise DreamkitError(
            f"the network in float, as it is written for the runtime, does not do what the network "
            f"does: {differ}; nothing was written"
        )
    return bench


@contextmanager
def told_plainly() -> Iterator[None]:
    """Say of any failure of a quantizer that the network cannot be quantised, and why."""
    try:
        yield
    except DreamkitError:
        raise
    except Exception as error:  # runtimes fail in as many ways as networks can be written
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DreamkitError(f"the network cannot be quantised: {reason}") from error
