"""What the functions that make a student have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from dreamkit.api.call_folder import fingerprint
from dreamkit.api.given_images import GivenImages
from dreamkit.api.invert import invert, synthesizer_options
from dreamkit.api.results import StudentResult, described, student_fields
from dreamkit.api.session import Session
from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.recipe.options import keywords_of
from dreamkit.recipe.shares import MIX, without_shares
from dreamkit.recipe.signature import nested_options, options_of
from dreamkit.stages.measuring import measure_costs
from dreamkit.types import Application, Images, Outcome, RunContext, Synthesis

DREAMED = 1024
"""Images that are dreamed where none are given."""
ToDream = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Options of one synthesizer by name, or of several, each with the ``share`` it may have."""


def run_application(
    work: Session,
    name: str,
    options: Mapping[str, Any],
    images: Any,
    synthesis: ToDream | None,
    given: Sequence[str | None] = (),
    *,
    function: Callable[..., Any],
    told: bool = True,
    allow_foreign: bool = False,
) -> tuple[Outcome, dict[str, Any]]:
    """Run an application on a caller's images, or on dreams that are made first.

    Args:
        work: the call.
        name: of the application.
        options: its own.
        images: as the caller holds them; None to dream them.
        synthesis: options of the synthesizer that dreams, laid over ``invert``'s; or a list of them
            for several, each with its ``share``.
        given: hashes of networks and images that the options have.
        function: that the caller called, whose other keywords the options were.
        told: whether a recipe has to be told where the images come from; its options may do so.
        allow_foreign: take dreams of another network.

    Returns:
        What it came to, and the settings of its result.

    Raises:
        DreamkitError: an option, or what is given, cannot be used.
    """
    application: Application = work.application(name, options, function)
    source: Images | Synthesis | None = None
    origin: dict[str, Any] = {}
    if images is not None:
        source, origin = work.images(images, allow_foreign), _origin(images)
    elif application.needs_synthesis:
        source = _to_dream(work, {} if synthesis is None else synthesis)
        origin = {"synthesis": source.settings}
    if synthesis is not None and not isinstance(source, Synthesis):
        raise DreamkitError("synthesis: leave it out: nothing is dreamed here")
    settings = recipe_settings(name, options, origin if told else {})
    work.begin(settings, [fingerprint(source), *given])
    return application.run(work.teacher, source, work.context), settings


def _to_dream(work: Session, options: ToDream) -> Synthesis:
    if isinstance(options, list | tuple):
        told, shares = without_shares(options, 1.0)
        entry: dict[str, Any] = {"name": MIX, "of": [_entry(work, one) for one in told]}
        entry |= {} if shares is None else {"shares": shares}
    else:
        entry = _entry(work, options)
    return work.synthesis(entry, invert, ("synthesis",))


def _entry(work: Session, options: Any) -> dict[str, Any]:
    """Return a synthesizer's entry, as a recipe has it, from options as ``invert`` has them."""
    if not isinstance(options, Mapping):
        raise DreamkitError(
            f"synthesis: should be options of invert by name, such as {{'images': 256}}, or a list "
            f"of them, not {type(options).__name__}; finished dreams are images"
        )
    options = {"images": DREAMED, **options}
    method = options.pop("method", options.pop("name", "deepinversion"))
    preset, steps = options.pop("preset", "fast"), options.pop("steps", None)
    return synthesizer_options(options, work.teacher, preset, method, steps)


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
        application.pop("images", None)  # they are dreamed
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


def training_options(
    cls: type[Any], keywords: Mapping[str, Any], function: Callable[..., Any]
) -> dict[str, Any]:
    """Sort keywords into options of an application and those of its ``training``.

    Args:
        cls: the application.
        keywords: as the caller gave them.
        function: that the caller called; for messages.

    Raises:
        DreamkitError: one is an option of neither, or ``training`` is given beside options of it.
    """
    own = {field.name for field in fields(cls)}
    (trained,) = nested_options(options_of(cls)["training"].annotation)
    known = own | options_of(trained).keys() | set(keywords_of(function))
    for name in keywords:
        if name not in known:
            hint = did_you_mean(name, known) or f" (options: {', '.join(sorted(known))})"
            raise DreamkitError(f"{name}: unknown option{hint}")
    options = {name: value for name, value in keywords.items() if name in own}
    training = {name: value for name, value in keywords.items() if name not in own}
    if training:
        if "training" in options:
            raise DreamkitError(f"training: give either it or '{next(iter(training))}'")
        options["training"] = training
    return options


def keep_student(context: RunContext, made: StudentResult) -> None:
    """Save a student in the folder that a caller named."""
    made.save(context.folder / RunContext.STUDENT, overwrite=True)
