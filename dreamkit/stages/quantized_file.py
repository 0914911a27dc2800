"""What a file in integers comes to: measured beside float, and kept with what is known of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamkit import distributed
from dreamkit.errors import ArtifactError, DreamkitError
from dreamkit.evaluation.accuracy import predict
from dreamkit.stages.quantizing import FileNetwork, Workbench
from dreamkit.stages.samples import Parts
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.types import Images, RunContext
from dreamkit.version import __version__

WORST = 5
"""Layers that are named for their noise."""
_LOOKED_AT = 16
"""Images that the noise of layers is measured on."""
_FASTER = 1.05
"""A file that is not faster by more is not faster."""


@dataclass(frozen=True)
class Finished:
    """A file in integers, and what was measured with it.

    Args:
        path: of the file.
        kept_float: layers that stay in float.
        noise: signal-to-noise ratio of layers in dB, the worst first.
        agreement: share of images that it puts into float's class, without saturation.
    """

    path: Path
    kept_float: tuple[str, ...]
    noise: dict[str, float]
    agreement: float

    @property
    def worst(self) -> str:
        """The layers of most noise, for people."""
        some = list(self.noise.items())[:WORST]
        return ", ".join(f"{name} ({level:.1f} dB)" for name, level in some)


def measure_file(
    bench: Workbench,
    network: str,
    path: Path,
    kept_float: Sequence[str],
    parts: Parts,
    further: Images | None,
) -> Finished:
    """Hold a file against float: agreement, accuracy, noise, size, and saturation here.

    Args:
        bench: with the network in float.
        network: what it is called, ``teacher`` or ``student``.
        path: of the file.
        kept_float: layers that stay in float.
        parts: the images that it was calibrated on, and others.
        further: more images to compare on.
    """
    context, metrics = bench.context, bench.context.log.metrics
    with context.log.progress("comparing with float", 3) as advance:
        right = bench.logits(bench.float_file, parts.compared)
        advance(1)
        exact = bench.logits(path, parts.compared)
        advance(2)
        here = bench.logits(path, parts.compared, exact=False)
    agreement = _agreement(exact, right)
    saturated = 1 - _agreement(here, exact)
    metrics |= {
        "int8.agreement": _agreement(here, right),
        "int8.saturation": saturated,
        "int8.logits_snr_db": _decibels(exact, right),
        "float.bytes": float(bench.float_file.stat().st_size),
        "int8.bytes": float(path.stat().st_size),
    }
    if saturated > 0:
        context.log.note(
            f"sums of products saturate on this processor: it puts {saturated:.1%} of the images "
            "into other classes than the file's own arithmetic does, and others may put more. "
            "Write it for the target 'portable'"
        )
    if further is not None:
        exact, right = (bench.logits(file, further) for file in (path, bench.float_file))
        metrics["int8.further_agreement"] = _agreement(exact, right)
    _measure_accuracy(bench, network, path)
    look = bench.quantization.look(path, bench.card.normalise(_some(parts.compared)))
    noise = dict(sorted(look.noise.items(), key=lambda layer: layer[1]))
    context.log.details["quantization"] = {
        "network": network,
        "compared": {"images": len(parts.compared), "unseen": parts.apart},
        "kept_float": list(kept_float),
        "computed_in_float": dict(look.in_float),
        "noise": noise,
    }
    if look.in_float:
        counts = ", ".join(f"{name} ({number})" for name, number in sorted(look.in_float.items()))
        context.log.note(f"operators that compute in float in the file: {counts}")
    return Finished(path, tuple(kept_float), noise, agreement)


def _measure_accuracy(bench: Workbench, name: str, path: Path) -> None:
    """Add accuracies and agreement on the evaluation images, where there are some."""
    context, metrics = bench.context, bench.context.log.metrics
    if context.evaluation is None:
        return
    network = FileNetwork(bench.quantizer.load(path, None, exact=True))
    cpu, images = torch.device("cpu"), context.evaluation
    with context.log.progress("accuracy", 2 * len(images)) as advance:
        found, labels = predict(network, images, bench.card, cpu, advance)
        model, device, done = bench.teacher.model, context.device, len(images)
        expected, _ = predict(model, images, bench.card, device, lambda k: advance(done + k))
    metrics[f"{name}.accuracy"] = float((expected == labels).float().mean())
    metrics["int8.accuracy"] = float((found == labels).float().mean())
    metrics["int8.evaluation_agreement"] = float((found == expected).float().mean())
    if whole := metrics.get("teacher.accuracy"):
        metrics["int8.accuracy_ratio"] = metrics["int8.accuracy"] / whole
        if name != "teacher":
            metrics[f"{name}.accuracy_ratio"] = metrics[f"{name}.accuracy"] / whole


def time_file(bench: Workbench, path: Path, batches: Sequence[int]) -> None:
    """Time a file and float in turn, on one thread and on all, and say if it is not faster.

    Args:
        bench: with the network in float.
        path: of the file.
        batches: images in a pass.
    """
    rows, metrics = [], bench.context.log.metrics
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = [(batch, threads) for batch in batches for threads in sorted({1, cores or 1})]
    with bench.context.log.progress("timing files", len(each)) as advance:
        for number, (batch, threads) in enumerate(each, 1):
            slow, fast = bench.times((bench.float_file, path), batch, threads)
            rows.append(
                {
                    "batch_size": batch,
                    "threads": threads,
                    "float_ms": slow.median_ms,
                    "int8_ms": fast.median_ms,
                }
            )
            advance(number)
    bench.context.log.details["quantization"]["latency"] = rows
    if not rows:
        return
    first = rows[0]
    metrics["float.latency_ms"], metrics["int8.latency_ms"] = first["float_ms"], first["int8_ms"]
    metrics["int8.speedup"] = first["float_ms"] / first["int8_ms"]
    if bench.quantizer.faster and metrics["int8.speedup"] < _FASTER:
        bench.context.log.note(
            f"integers are not faster on this processor: {first['int8_ms']:.3g} ms against "
            f"{first['float_ms']:.3g} in float. They are on processors with dot products of bytes: "
            "x86 with VNNI (avx512_vnni, avx_vnni), ARM with asimddp; small networks gain least"
        )


def keep_file(bench: Workbench, finished: Finished, calibration: dict[str, Any]) -> Path:
    """Put a file into the run directory, with the JSON that says what it is; return its place.

    Args:
        bench: that wrote it.
        finished: the file.
        calibration: what is to be said of the calibration images.

    Raises:
        DreamkitError: the folder cannot be made.
    """
    context, content = bench.context, finished.path.read_bytes()
    folder = context.folder / RunContext.QUANTIZED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DreamkitError(f"{folder} cannot be made: {error.strerror}") from error
    path = folder / f"model{bench.quantizer.suffix}"
    told = {
        "dreamkit": __version__,
        "file": path.name,
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "card": bench.card.to_json(),
        "calibration": calibration,
        "kept_float": list(finished.kept_float),
        "metrics": {
            name: value
            for name, value in sorted(context.log.metrics.items())
            if name.startswith(("int8.", "float."))
        },
        "noise_db": finished.noise,
        "quantization": dict(bench.quantization.describe()),
    }
    write_atomically(path, content)
    write_json(path.with_suffix(".json"), told)
    distributed.barrier()
    return path


def check_quantized(described: Path) -> None:
    """Hold a file in integers against the JSON beside it.

    Raises:
        ArtifactError: either is not there, or the file is not what the JSON tells.
    """
    try:
        told = json.loads(described.read_text(encoding="utf-8"))
        content = (described.parent / told["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() == told["file_sha256"]:
            return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{described} cannot be read: {error}") from error
    raise ArtifactError(f"{described.parent / told['file']} is not what its JSON tells")


def _some(images: Images) -> Tensor:
    return images.batch(range(min(len(images), _LOOKED_AT)))[0]


def _agreement(found: Tensor, right: Tensor) -> float:
    return float((found.argmax(1) == right.argmax(1)).float().mean())


def _decibels(found: Tensor, right: Tensor) -> float:
    noise = (found - right).double().square().sum()
    return float(10 * (right.double().square().sum() / noise.clamp(min=1e-30)).log10())
