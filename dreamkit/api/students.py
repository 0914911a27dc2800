"""What the functions that make a student have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dreamkit.api.given_images import GivenImages
from dreamkit.api.invert import synthesizer_options
from dreamkit.api.results import StudentResult, described, student_fields
from dreamkit.api.session import Session
from dreamkit.errors import DreamkitError
from dreamkit.stages.measuring import measure_costs
from dreamkit.types import Application, Images, Outcome, RunContext, Synthesis

DREAMED = 1024
"""Images that are dreamed where none are given."""


def run_application(
    work: Session, application: Application, images: Any, synthesis: Mapping[str, Any] | None
) -> tuple[Outcome, dict[str, Any]]:
    """Run an application on a caller's images, or on dreams that are made first.

    Args:
        work: the call.
        application: with its options.
        images: as the caller holds them; None to dream them.
        synthesis: options of the synthesizer that dreams, laid over ``invert``'s.

    Returns:
        What it came to, and where the images come from: ``synthesis`` or ``images``.
    """
    source: Images | Synthesis | None
    settings: dict[str, Any] = {}
    if images is not None:
        if synthesis is not None:
            raise DreamkitError("synthesis: leave it out where images are given")
        source = work.images(images)
        settings = _origin(images)
    elif application.needs_synthesis:
        options = {"images": DREAMED, **(synthesis or {})}
        method = options.pop("method", options.pop("name", "deepinversion"))
        preset, steps = options.pop("preset", "fast"), options.pop("steps", None)
        source = work.synthesis(
            synthesizer_options(options, work.teacher.card, preset, method, steps)
        )
        settings = {"synthesis": source.settings}
    else:
        source = None
    return application.run(work.teacher, source, work.context), settings


def _origin(images: Any) -> dict[str, Any]:
    """Return how a caller's images were dreamed, if they tell; else a source to be filled in."""
    told = getattr(images, "settings", None)
    synthesis = told.get("synthesis") if isinstance(told, Mapping) else None
    if synthesis is None:
        return {"images": GivenImages(images, "images")}
    return {"synthesis": {**synthesis, "images": len(images)}}


def recipe_settings(
    name: str, options: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an application and where its images come from, as a recipe has them."""
    application = {"name": name, **options}
    if "synthesis" in origin:
        return {"synthesis": origin["synthesis"], "application": application}
    return {"application": {**application, **origin}}


def result_fields(
    work: Session, outcome: Outcome, settings: Mapping[str, Any], timed: bool
) -> dict[str, Any]:
    """Measure what a student costs, and return the fields of its result.

    Args:
        work: the call.
        outcome: with a student.
        settings: of the result.
        timed: whether latencies are measured, unless the application has done it.
    """
    if outcome.student is None:
        raise DreamkitError("this application makes no student")
    measure_costs(outcome, work.teacher, work.context, latency=timed)
    return {**described(work, settings), **student_fields(outcome.student)}


def training_options(cls: type[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Sort keywords into options of an application and those of its ``training``.

    Args:
        cls: the application.
        keywords: as the caller gave them; one that is no option of the application is taken for
            one of its training, where unknown ones are refused.

    Raises:
        DreamkitError: ``training`` is given beside options of it.
    """
    own = {field.name for field in fields(cls)}
    options = {name: value for name, value in keywords.items() if name in own}
    training = {name: value for name, value in keywords.items() if name not in own}
    if training:
        given = options.get("training", {})
        if not isinstance(given, Mapping):
            raise DreamkitError(f"training: give either it or '{next(iter(training))}'")
        options["training"] = {**given, **training}
    return options


def keep_student(context: RunContext, made: StudentResult) -> None:
    """Save a student in the folder that a caller named."""
    made.save(context.folder / RunContext.STUDENT)
