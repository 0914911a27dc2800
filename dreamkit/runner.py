"""Running a recipe: build the pieces it names, run its application, write the run directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from dreamkit import distributed
from dreamkit.allocator import freed_memory_kept
from dreamkit.devices import choose_device, default_backend
from dreamkit.errors import DreamkitError, RunDirectoryError, placed
from dreamkit.latency.first_rank import FirstRank
from dreamkit.out_of_memory import ASK_LESS, enough_memory
from dreamkit.plugins import added_rules
from dreamkit.recipe import LoadedRecipe
from dreamkit.report.notebook import LivePicture
from dreamkit.report.run_log import FileLog, MemoryLog
from dreamkit.run_report import build_report, show, write_pages
from dreamkit.stages.dreaming import estimate_synthesis
from dreamkit.stages.measuring import measure_costs
from dreamkit.stages.opening import check_dreamed, open_evaluation, opened
from dreamkit.stages.saving import save_student
from dreamkit.store.run_directory import RunDirectory, read_report
from dreamkit.teachers.intake import admit
from dreamkit.trackers.isolated import IsolatedTrackers
from dreamkit.types import (
    Application,
    Images,
    Outcome,
    RunContext,
    RunFailed,
    RunFinished,
    RunLog,
    RunStarted,
    Synthesis,
    Teacher,
)
from dreamkit.wording import say


def default_folder(loaded: LoadedRecipe) -> Path:
    """Return where a recipe runs if nothing else is said: ``runs/<name>[-<preset>]``."""
    name = loaded.recipe.name
    return Path("runs") / (f"{name}-{loaded.preset}" if loaded.preset else name)


def run(
    loaded: LoadedRecipe,
    folder: Path,
    console: Console,
    resume: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Path:
    """Run a recipe in a folder, going on with what an interrupted run of it left.

    Args:
        loaded: the checked recipe.
        folder: the run directory.
        console: where progress and the result are shown.
        resume: refuse to start afresh.
        stopping: asked between steps whether the run is to stop.

    Returns:
        The run directory. A finished run is left as it is.

    Raises:
        DreamkitError: anything that the user can put right, with its place in the recipe.
    """
    directory = RunDirectory(folder, loaded.resolved_yaml(), loaded.preset)
    distributed.barrier()  # before the first rank writes what another might take for foreign
    if resume and not directory.started:
        raise RunDirectoryError(f"{folder} holds no run to resume; leave --resume out to start one")
    if directory.finished:
        say(console, f"{folder} already holds this recipe's finished run:")
        show(read_report(folder), folder, console)
        return folder
    try:
        with freed_memory_kept():
            _run(loaded, directory, console, stopping)
    except DreamkitError as error:
        raise loaded.placed(error) from error
    return folder


def dry_run(loaded: LoadedRecipe, folder: Path, console: Console) -> None:
    """Load what a recipe names, time a few steps and print what its dreaming would cost.

    Args:
        loaded: the checked recipe.
        folder: the run directory; what is dreamed there already costs nothing.
        console: where the cost is shown.

    Raises:
        DreamkitError: anything that the user can put right, with its place in the recipe.
    """
    log = MemoryLog(console)
    application: Application = loaded.recipe.application
    try:
        teacher, images, context = _prepare(loaded, folder, log)
        student = None
        with placed("application", always=False):
            if application.trains_student:
                with placed("application"):
                    student = application.make_student(teacher, context).model
            if isinstance(images, Synthesis):
                images, context = application.planned(teacher, images, context)
        if (
            not isinstance(images, Synthesis)
            or estimate_synthesis(teacher, images, context, student) is None
        ):
            log.note("nothing is to be dreamed")
    except DreamkitError as error:
        raise loaded.placed(error) from error
    log.note("dry run: only dreaming is estimated, and nothing was written")


def _prepare(
    loaded: LoadedRecipe, folder: Path, log: RunLog
) -> tuple[Teacher, Images | Synthesis | None, RunContext]:
    """Load what a recipe names, before anything is written."""
    recipe = loaded.recipe
    device = choose_device(recipe.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what times models asks for the current device
    with placed("teacher"), log.progress("loading", 1), enough_memory("loading", ASK_LESS):
        loaded_teacher: Teacher = recipe.teacher.load(recipe.seed)
        loaded_teacher.model.to(device)
        teacher = admit(loaded_teacher, log.note, "the teacher")
    with placed("synthesis"):
        if recipe.synthesis is not None:
            recipe.synthesis.check(teacher)
    evaluation = _open_evaluation(loaded, teacher, log)
    images = _images(loaded, teacher, log)
    latency = recipe.latency or default_backend(loaded.registries, device)
    latency = latency if distributed.size() == 1 else FirstRank(latency)
    rules = added_rules(loaded.registries, log.note)
    context = RunContext(recipe.seed, device, folder, log, latency, evaluation, rules)
    return teacher, images, context


def _images(loaded: LoadedRecipe, teacher: Teacher, log: RunLog) -> Images | Synthesis | None:
    """Return what the application works on: dreams to come, images that are there, or none."""
    application: Application = loaded.recipe.application
    if application.needs_synthesis:
        assert loaded.recipe.synthesis is not None  # the recipe's reader saw to it
        return Synthesis(loaded.recipe.synthesis, loaded.resolved()["synthesis"])
    option = application.images_option
    source = getattr(application, option, None)
    if source is None:
        return None
    with placed("application", option):
        check_dreamed(source, teacher.card)
        return opened(source, teacher.card, log.note)


def _run(
    loaded: LoadedRecipe, directory: RunDirectory, console: Console, stopping: Callable[[], bool]
) -> None:
    first = distributed.is_first()
    log = FileLog(directory.folder, console, stopping)
    trackers = IsolatedTrackers(loaded.recipe.trackers if first else (), log.note)
    claimed = came_to_nothing = False
    try:
        with distributed.first_before_others():
            teacher, images, context = _prepare(loaded, directory.folder, log)
        distributed.barrier()  # nothing is claimed unless every rank has loaded what it needs
        abandoned = directory.claim() if first else None
        claimed = True
        distributed.barrier()
        log.open()
        if abandoned is not None and directory.started:
            log.note(f"going on after {abandoned}, which ended without finishing")
        if first:
            log.listen(trackers.hear)
            log.listen(loaded.registries.events(log.note).emit)
            log.listen(LivePicture(console))
        whole, resumed = loaded.resolved(), directory.started
        log.emit(RunStarted(folder=directory.folder, recipe=whole, resumed=resumed))
        _say_what(loaded, teacher, context, console)
        with placed("application", always=False), enough_memory("working", ASK_LESS):
            outcome: Outcome = loaded.recipe.application.run(teacher, images, context)
            _keep(outcome, teacher, context)
        if first:
            with log.progress("report", 1):
                report = build_report(loaded, teacher, context, log)
                write_pages(report, directory, log.note)
            shutil.rmtree(directory.folder / RunContext.CHECKPOINTS, ignore_errors=True)
            log.emit(RunFinished(report=report))
            show(report, directory.folder, console)
    except BaseException as error:
        if not directory.finished:  # else only what came after the report went wrong
            log.emit(RunFailed(error=error))
            came_to_nothing = first and claimed and isinstance(error, DreamkitError)
        raise
    finally:
        trackers.close()
        log.close()
        if came_to_nothing:
            directory.withdraw(trackers.withdraw)
        directory.release()
    distributed.barrier()


def _keep(outcome: Outcome, teacher: Teacher, context: RunContext) -> None:
    """Measure what the student costs, and save it."""
    student = outcome.student
    if student is None:
        return
    if context.evaluation is None and "student.agreement" in context.log.metrics:
        context.log.note(
            "without evaluation images: how often the student agrees with the teacher says little "
            "of real data"
        )
    measure_costs(outcome, teacher, context, latency=True)
    folder = context.folder / RunContext.STUDENT
    with context.log.progress("saving the student", 1):
        save_student(folder, student)


def _open_evaluation(loaded: LoadedRecipe, teacher: Teacher, log: RunLog) -> Images | None:
    source = loaded.recipe.evaluation
    if source is None:
        return None
    with placed("evaluation"):
        return open_evaluation(source, teacher.card, log.note)


def _say_what(
    loaded: LoadedRecipe, teacher: Teacher, context: RunContext, console: Console
) -> None:
    card, ranks = teacher.card, distributed.size()
    where = f"{context.device}" if ranks == 1 else f"{ranks} ranks, the first on {context.device}"
    say(
        console,
        f"{loaded.recipe.name}: teacher {card.name} ({card.origin}), on {where}, into "
        f"{context.folder}",
    )
    if not card.trained:
        context.log.note(
            "the teacher's weights are random: this run shows the mechanics only, and its "
            "pictures and accuracies mean nothing"
        )
    if context.evaluation is None:
        context.log.note("no evaluation images: accuracy on real data is unknown")
