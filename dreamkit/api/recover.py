"""Prune single weights of a network in memory, and let it recover."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.given_images import ImagesLike
from dreamkit.api.networks import View
from dreamkit.api.results import Recovered
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import (
    ToDream,
    keep_student,
    result_fields,
    run_application,
    training_options,
)
from dreamkit.applications.recover import Recover
from dreamkit.types import Teacher


def recover(
    model: nn.Module | Teacher,
    images: ImagesLike | None = None,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
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
) -> Recovered:
    """Set a share of a network's weights to zero, and let it recover with the zeros kept.

    arXiv 2511.20702. The smallest weights of all convolutions and linear layers together go, or,
    by a pattern, the smallest of each few. The network stays as it is.

    Args:
        model: trained.
        images: as of ``prune``; 1,024 are dreamed where there are none.
        sparsity: share of the weights that goes, in (0, 1); this or ``pattern``.
        pattern: ``"N:M"``, such as ``"2:4"``: of every M weights along the input channels the N
            largest stay.
        synthesis: how images are dreamed, options of ``invert``, or a list of them for several.
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
            (``dreamkit show applications recover``), e.g. ``rounds=5, reconstruction={}``.

    Raises:
        DreamkitError: the network, the images or an option cannot be used; the message names it.
    """
    said = {"sparsity": sparsity, "pattern": pattern}
    given = {name: value for name, value in said.items() if value is not None}
    given |= training_options(Recover, options, recover)
    conditions = Conditions(
        View(size, mean, std, class_names), seed, device, progress, out, evaluation
    )
    with session(model, conditions) as work:
        outcome, settings = run_application(
            work, "recover", given, images, synthesis, function=recover, allow_foreign=allow_foreign
        )
        made = Recovered(**result_fields(work, outcome, settings, timed=False))
        if out is not None:
            keep_student(work.context, made)
        return made
