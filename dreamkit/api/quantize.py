"""Write a network in memory in integers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.given_images import GivenImages, ImagesLike
from dreamkit.api.networks import View
from dreamkit.api.results import Quantized, StudentResult, described, student_fields
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import ToDream, run_application
from dreamkit.errors import DreamkitError
from dreamkit.students import load_student
from dreamkit.types import Quantizer, RunContext, Teacher


def quantize(
    model: nn.Module | Teacher | str | Path,
    images: ImagesLike | None = None,
    *,
    weights: str | None = None,
    target: str | None = None,
    ranges: str | None = None,
    bias_correction: bool | None = None,
    equalise: bool | None = None,
    keep_float: str | Sequence[str] = (),
    quantizer: str | Mapping[str, Any] | Quantizer = "onnxruntime",
    compare: ImagesLike | None = None,
    synthesis: ToDream | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    out: str | Path | None = None,
    evaluation: ImagesLike | None = None,
    allow_foreign: bool = False,
    **options: Any,
) -> Quantized:
    """Write a network in 8-bit integers, calibrated without real images, and measure it.

    The network stays as it is. Needs the extra ``onnx``.

    Args:
        model: trained; or the folder of a run that made a student, or of a student.
        images: what it is calibrated on and compared with float on: dreams, a tensor,
            (images, labels), a Dataset, a DataLoader or the path of an image folder. Without them
            1,024 images are dreamed first.
        weights: ``int8`` (the default), or ``int4`` for a file half as large that is not faster.
        target: the processor that the file will meet: ``portable`` (the default), ``vnni``,
            ``arm``, ``tensorrt``, or ``auto`` for this machine's.
        ranges: of activations: ``minmax``, ``mse`` or ``logits``.
        bias_correction: take back what rounding weights does to the mean of outputs; the default.
        equalise: make the ranges of channels between two layers alike first.
        keep_float: names of layers that stay in float, with ``*``; or ``"auto"``.
        quantizer: of another runtime, by name or with its options; the keywords above are options
            of ``onnxruntime``.
        compare: further images to measure agreement on.
        synthesis: how images are dreamed where none are given, options of ``invert``, or a list of
            them for several.
        size: as of ``invert``, and so are ``mean``, ``std``, ``class_names``, ``seed``, ``device``
            and ``progress``.
        mean: per channel.
        std: per channel.
        class_names: in output order.
        seed: of everything random.
        device: where to dream; the file is run on the CPU.
        progress: show notes and a bar.
        out: a folder that keeps finished batches of dreams, and the file in the end.
        evaluation: labelled images to report accuracy on.
        allow_foreign: take dreams of another network as ``images``.
        **options: of the application, as in a recipe (``dreamkit show applications quantize``),
            e.g. ``calibration_images=128, max_disagreement=0.05``. ``training={"steps": 200}``
            trains in integers on the images. With ``after={"name": "prune", ...}`` the network is
            pruned first, and the result has the ``student``.

    Raises:
        DreamkitError: the network, the images or an option cannot be used; the message names it.
    """
    if isinstance(model, str | Path):
        model = load_student(model)
    said = {
        "weights": weights,
        "target": target,
        "ranges": ranges,
        "bias_correction": bias_correction,
        "equalise": equalise,
    }
    said = {name: value for name, value in said.items() if value is not None}
    chosen = {"name": quantizer} if isinstance(quantizer, str) else quantizer
    if said and not isinstance(chosen, Mapping):
        raise DreamkitError(f"{next(iter(said))}: leave it out where 'quantizer' is an object")
    given: dict[str, Any] = {
        "quantizer": {**chosen, **said} if isinstance(chosen, Mapping) else chosen,
        "keep_float": keep_float if isinstance(keep_float, str) else list(keep_float),
        **options,
    }
    if compare is not None:
        given["compare"] = GivenImages(compare, "compare", allow_foreign=allow_foreign)
    view = View(size, mean, std, class_names)
    conditions = Conditions(view, seed, device, progress, out, evaluation)
    with session(model, conditions) as work:
        outcome, settings = run_application(
            work,
            "quantize",
            given,
            images,
            synthesis,
            function=quantize,
            allow_foreign=allow_foreign,
        )
        folder = work.context.folder / RunContext.QUANTIZED
        (described_in,) = folder.glob("*.json")
        told = json.loads(described_in.read_text(encoding="utf-8"))
        file = folder / told["file"]
        built = work.application("quantize", given, quantize)
        known, made = described(work, settings), outcome.student
        return Quantized(
            file=file.read_bytes(),
            file_name=file.name,
            card=work.teacher.card,
            about=told,
            quantizer=built.quantizer,  # type: ignore[attr-defined]
            student=None if made is None else StudentResult(**known, **student_fields(made)),
            **known,
        )
