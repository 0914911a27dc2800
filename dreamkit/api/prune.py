"""Prune a network in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.given_images import ImagesLike
from dreamkit.api.networks import View
from dreamkit.api.results import Pruned
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import ToDream, keep_student, result_fields, run_application
from dreamkit.applications.prune import Prune
from dreamkit.errors import DreamkitError
from dreamkit.stages.teaching import Recovery
from dreamkit.types import LatencyBackend, Teacher

_OWN = {field.name for field in fields(Prune)}


def prune(
    model: nn.Module | Teacher,
    images: ImagesLike | None = None,
    *,
    flops: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    criteria: Mapping[str, Any] | Sequence[Any] | None = None,
    synthesis: ToDream | None = None,
    latency_backend: str | Mapping[str, Any] | LatencyBackend | None = None,
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
) -> Pruned:
    """Remove a network's least important channels, and let it recover by distillation.

    DeepInversion (Yin et al., CVPR 2020), section 4.3 and eq. 10. The network stays as it is.

    Args:
        model: trained.
        images: what channels are ranked on and the network recovers on: dreams, a tensor,
            (images, labels), a Dataset, a DataLoader or the path of an image folder. Without them
            1,024 images are dreamed first.
        flops: share of the FLOPs that is to be left, in (0, 1). Every goal that is given must be
            met; one at least is.
        params: share of the parameters that is to be left.
        channels: share of the prunable channels that is to be left.
        latency: share of the latency that is to be left, as measured here.
        latency_ms: milliseconds that it may take here.
        criteria: the weighted terms of the importance, e.g. ``{"taylor": 1, "latency_lut": 0.1}``;
            Taylor importance alone by default.
        synthesis: how images are dreamed where none are given, options of ``invert``, or a list of
            them for several.
        latency_backend: times networks, e.g. ``"torch-cpu"`` or, for INT8, ``{"name":
            "onnxruntime", "dtype": "int8"}``; given, latencies are reported too.
        size: as of ``invert``, and so are ``mean``, ``std``, ``class_names``, ``seed``, ``device``
            and ``progress``.
        mean: per channel.
        std: per channel.
        class_names: in output order.
        seed: of everything random.
        device: where to work.
        progress: show notes and a bar.
        out: a folder from which the same call goes on after an interruption, and where the student
            is saved in the end.
        evaluation: labelled images to report accuracy on.
        allow_foreign: take dreams of another network as ``images``.
        **options: of the application, as in a recipe (``dreamkit show applications prune``), e.g.
            ``recovery={"steps": 500}, selection="knapsack"``.

    Raises:
        DreamkitError: the network, the images or an option cannot be used; the message names it.
    """
    goals = {
        "flops": flops,
        "params": params,
        "channels": channels,
        "latency": latency,
        "latency_ms": latency_ms,
    }
    target = {name: goal for name, goal in goals.items() if goal is not None}
    if target and "target" in options:
        raise DreamkitError(f"target: leave it out where '{next(iter(target))}' is given")
    training = sorted({field.name for field in fields(Recovery)} & set(options) - _OWN)
    if training:
        raise DreamkitError(f"{training[0]}: give it as recovery={{'{training[0]}': ...}}")
    weighted = {"taylor": 1} if criteria is None else criteria
    given = {"criteria": weighted, "target": target, **options}
    view = View(size, mean, std, class_names)
    conditions = Conditions(view, seed, device, progress, out, evaluation, latency_backend)
    with session(model, conditions) as work:
        outcome, settings = run_application(
            work, "prune", given, images, synthesis, function=prune, allow_foreign=allow_foreign
        )
        rounds = work.log.records.get("pruning", {}).values()
        timed = latency_backend is not None or any("latency_ms" in look for look in rounds)
        made = Pruned(
            skipped=work.log.details["pruning_skipped"],
            **result_fields(work, outcome, settings, timed),
        )
        if out is not None:
            keep_student(work.context, made)
        return made
