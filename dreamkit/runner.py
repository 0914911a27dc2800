"""Running a recipe: build the pieces it names, run its application, write the run directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from dreamkit import distributed
from dreamkit.devices import choose_device, default_backend
from dreamkit.errors import DreamkitError, RunDirectoryError, placed
from dreamkit.latency.first_rank import FirstRank
from dreamkit.recipe import LoadedRecipe
from dreamkit.report.run_log import FileLog
from dreamkit.run_report import build_report, show, write_pages
from dreamkit.stages.dreaming import estimate_synthesis
from dreamkit.store.run_directory import RunDirectory, read_report
from dreamkit.teachers.checking import check_outputs
from dreamkit.types import NO_LABEL, Images, RunContext, RunLog, Teacher


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
    directory = RunDirectory(folder, loaded.resolved_yaml())
    distributed.barrier()  # before the first rank writes what another might take for foreign
    if resume and not directory.started:
        raise RunDirectoryError(f"{folder} holds no run to resume; leave --resume out to start one")
    if directory.finished:
        console.print(
            f"{folder} already holds this recipe's finished run:", highlight=False, markup=False
        )
        show(read_report(folder), folder, console)
        return folder
    try:
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
    log = FileLog(folder, console)  # notes alone, which write no file
    application = loaded.recipe.application
    try:
        context = _context(loaded, folder, log)
        student = None
        if getattr(application, "trains_student", False):
            with placed("application"):
                student = application.make_student(context).model
        dreams = getattr(application, "needs_synthesis", False)
        if dreams and hasattr(application, "planned"):
            with placed("application", always=False):
                context = application.planned(context)
        if not dreams or estimate_synthesis(context, student) is None:
            log.note("nothing is to be dreamed")
    except DreamkitError as error:
        raise loaded.placed(error) from error
    log.note("dry run: only dreaming is estimated, and nothing was written")


def _context(loaded: LoadedRecipe, folder: Path, log: RunLog) -> RunContext:
    """Load what a recipe names, before anything is written."""
    recipe = loaded.recipe
    device = choose_device(recipe.device)
    with placed("teacher"):
        teacher: Teacher = recipe.teacher.load(recipe.seed)
        check_outputs(teacher)
    with placed("synthesis"):
        if recipe.synthesis is not None:
            recipe.synthesis.check(teacher)
    evaluation = _open_evaluation(loaded, teacher)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what times models asks for the current device
    teacher.model.to(device)
    latency = recipe.latency or default_backend(loaded.registries, device)
    return RunContext(
        recipe=loaded.root.plain(),
        seed=recipe.seed,
        device=device,
        folder=folder,
        teacher=teacher,
        synthesizer=recipe.synthesis,
        evaluation=evaluation,
        latency=latency if distributed.size() == 1 else FirstRank(latency),
        log=log,
    )


def _run(
    loaded: LoadedRecipe, directory: RunDirectory, console: Console, stopping: Callable[[], bool]
) -> None:
    recipe, first = loaded.recipe, distributed.is_first()
    trackers = recipe.trackers if first else ()
    log = FileLog(directory.folder, console, trackers, stopping)
    with distributed.first_before_others():
        context = _context(loaded, directory.folder, log)
    distributed.barrier()  # nothing is claimed unless every rank has loaded what it needs
    abandoned = directory.claim() if first else None
    distributed.barrier()
    try:
        log.open()
        if abandoned is not None and directory.started:
            log.note(f"going on after {abandoned}, which ended without finishing")
        for tracker in trackers:
            tracker.start(directory.folder, context.recipe)
        _say_what(loaded, context, console)
        with placed("application", always=False):
            recipe.application.run(context)
        for tracker in trackers:
            tracker.finish(context.metrics)
        if first:
            report = build_report(loaded, context, log)
            write_pages(report, directory)
            shutil.rmtree(directory.folder / RunContext.CHECKPOINTS, ignore_errors=True)
            show(report, directory.folder, console)
    except DreamkitError:
        log.close()
        if first:
            directory.withdraw()
        raise
    finally:
        log.close()
        directory.release()
    distributed.barrier()


def _open_evaluation(loaded: LoadedRecipe, teacher: Teacher) -> Images | None:
    source = loaded.recipe.evaluation
    if source is None:
        return None
    with placed("evaluation"):
        images: Images = source.open(teacher.card)
        if len(images) == 0 or int(images.batch([0])[1][0]) == NO_LABEL:
            raise DreamkitError("evaluation needs images with labels")
        return images


def _say_what(loaded: LoadedRecipe, context: RunContext, console: Console) -> None:
    card, ranks = context.teacher.card, distributed.size()
    where = f"{context.device}" if ranks == 1 else f"{ranks} ranks, the first on {context.device}"
    console.print(
        f"{loaded.recipe.name}: teacher {card.name} ({card.origin}), on {where}, into "
        f"{context.folder}",
        highlight=False,
        markup=False,
    )
    if not context.teacher.card.trained:
        context.log.note(
            "the teacher's weights are random: this run shows the mechanics only, and its "
            "pictures and accuracies mean nothing"
        )
    if context.evaluation is None:
        context.log.note(
            "no evaluation images: accuracy on real data is unknown; how often the student agrees "
            "with the teacher is measured on the images it was trained on"
        )
