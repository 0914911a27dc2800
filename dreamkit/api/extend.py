"""Teach a network in memory more classes, without the data of its old ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dreamkit.api.call_folder import fingerprint
from dreamkit.api.given_images import GivenImages, ImagesLike, as_images
from dreamkit.api.networks import View
from dreamkit.api.results import Extended
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import (
    ToDream,
    keep_student,
    result_fields,
    run_application,
    training_options,
)
from dreamkit.applications.continual import Continual
from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.types import NO_LABEL, StoredImages, Teacher, notes_of


def extend(
    model: nn.Module | Teacher,
    new: ImagesLike,
    *,
    test: ImagesLike | None = None,
    new_names: Sequence[str] | None = None,
    replay: ImagesLike | Literal[False] | None = None,
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
) -> Extended:
    """Teach a network new classes while it keeps the old ones, without their data.

    DeepInversion (Yin et al., CVPR 2020), section 4.5 and eq. 11: the application ``continual``
    with one set of classes. To add another, extend the result's ``model``. The network stays as it
    is.

    Args:
        model: trained; its last layer is linear or a 1×1 convolution.
        new: images of the new classes and of no others, labelled from 0: (images, labels), a
            Dataset or a DataLoader.
        test: images of the new classes to report accuracy on, labelled likewise.
        new_names: of the new classes; the data set's own ``classes``, or numbers that go on from
            the old ones, by default.
        replay: real images that stand for the old classes, as of ``prune``; dreamed by default,
            250 of each (``images_per_class``). False for none, with ``losses`` that look at none.
        synthesis: how they are dreamed, options of ``invert``, or a list of them for several; their
            number is not one of them.
        size: as of ``invert``, and so are ``mean``, ``std``, ``class_names``, ``seed``, ``device``
            and ``progress``.
        mean: per channel.
        std: per channel.
        class_names: of the old classes, in output order.
        seed: of everything random.
        device: where to work.
        progress: show notes and a bar.
        out: a folder from which the same call goes on after an interruption, and where the network
            is saved in the end.
        evaluation: labelled images of the old classes to report accuracy on.
        allow_foreign: take dreams of another network as ``replay``.
        **options: of the application or of its ``training``, as in a recipe
            (``dreamkit show applications continual``), e.g. ``images_per_class=100, steps=2000``.

    Raises:
        DreamkitError: the network, the images or an option cannot be used; the message names it.
    """
    given = training_options(Continual, options, extend)
    conditions = Conditions(
        View(size, mean, std, class_names), seed, device, progress, out, evaluation
    )
    with session(model, conditions) as work:
        held, names = _taken(new, new_names, work.teacher.card)
        added: dict[str, Any] = {"train": GivenImages(held, "new", names), "name": "new"}
        if test is not None:
            added["test"] = GivenImages(test, "test", names)
        if replay is not None:
            given["replay"] = None if replay is False else GivenImages(replay, "replay")
        seen = dataclasses.replace(work.teacher.card, num_classes=len(names), class_names=names)
        outcome, settings = run_application(
            work,
            "continual",
            {"sets": [added], **given},
            None if replay is False else replay,
            synthesis,
            [fingerprint(as_images(held, seen, "new"))],
            function=extend,
            allow_foreign=allow_foreign,
            told=replay is None,  # else 'replay' says it
        )
        made = Extended(**result_fields(work, outcome, settings, timed=False))
        if out is not None:
            keep_student(work.context, made)
        return made


def _taken(new: Any, told: Sequence[str] | None, card: Card) -> tuple[Any, tuple[str, ...]]:
    """Return the new images, and the names of their classes.

    Names are as told, as the data set has them, or numbers that go on from the old classes'. For
    numbers the images are read once, and then held in memory, as are those that can be read but
    once.
    """
    if isinstance(told, str):
        raise DreamkitError(f"new_names: should be several names, not one (got {told!r})")
    if told is None:
        told = getattr(new, "classes", None)
    # As many as labels tell; any label fits a card of more classes than there can be.
    wide = dataclasses.replace(card, num_classes=2**31, class_names=None)
    if told is not None:
        held = as_images(new, wide, "new") if isinstance(new, Iterator) else new
        return held, tuple(str(name) for name in told)
    images = as_images(new, wide, "new")
    pixels, labels = images.batch(range(len(images)))
    if int(labels.min()) == NO_LABEL:
        raise DreamkitError("new: its images need labels, from 0: give (images, labels)")
    count = int(labels.max()) + 1
    missing = sorted({*range(count)} - {*labels.tolist()})
    if missing:
        raise DreamkitError(
            f"new: no image has the label {missing[0]}, and one has {count - 1}: label the new "
            "classes 0, 1, 2 ... without gaps"
        )
    held = StoredImages(pixels, labels, notes=notes_of(images))
    return held, tuple(str(card.num_classes + number) for number in range(count))
