"""Teach a student in memory what a network in memory knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.given_images import ImagesLike
from dreamkit.api.networks import GivenNetwork, View, take_in
from dreamkit.api.results import Distilled
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import (
    ToDream,
    keep_student,
    result_fields,
    run_application,
    training_options,
)
from dreamkit.applications.distill import Distill
from dreamkit.types import LatencyBackend, Teacher


def distill(
    model: nn.Module | Teacher,
    student: nn.Module | Teacher,
    images: ImagesLike | None = None,
    *,
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
) -> Distilled:
    """Teach a student a network's outputs on dreams, or on other images.

    DeepInversion (Yin et al., CVPR 2020), section 4.4; the loss is eq. 1 with a temperature. Both
    networks stay as they are: the result has a copy of the student that was taught.

    Args:
        model: the teacher, trained.
        student: with the teacher's inputs and outputs; it starts from the weights it has.
        images: as of ``prune``; 1,024 are dreamed where there are none.
        synthesis: how they are dreamed, options of ``invert``, or a list of them for several.
        latency_backend: times networks; given, latencies are reported too.
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
        **options: of the application or of its ``training``, as in a recipe
            (``dreamkit show applications distill``), e.g. ``steps=2000, lr=0.05, soft_loss="l1"``.

    Raises:
        DreamkitError: a network, the images or an option cannot be used; the message names it.
    """
    given = training_options(Distill, options, distill)
    view = View(size, mean, std, class_names)
    conditions = Conditions(view, seed, device, progress, out, evaluation, latency_backend)
    with session(model, conditions) as work:
        card = work.teacher.card
        # It learns on the teacher's images, whatever it was trained on before.
        seen = View(card.input_size, card.mean, card.std)
        taught = take_in(student, seen, work.log.note, "student")
        given = {"student": GivenNetwork(taught, weights=False), **given}
        hashed = [taught.card.weights_sha256]
        outcome, settings = run_application(
            work,
            "distill",
            given,
            images,
            synthesis,
            hashed,
            function=distill,
            allow_foreign=allow_foreign,
        )
        made = Distilled(**result_fields(work, outcome, settings, latency_backend is not None))
        if out is not None:
            keep_student(work.context, made)
        return made
