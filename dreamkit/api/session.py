"""One call of the library: where it works, what it shows, and what it leaves alone."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dreamkit.allocator import freed_memory_kept
from dreamkit.api.call_folder import NETWORK, claimed
from dreamkit.api.given_images import GivenImages
from dreamkit.api.networks import GivenNetwork, View, take_in
from dreamkit.devices import choose_device, default_backend
from dreamkit.errors import DreamkitError, RecipePath, placed
from dreamkit.model_state import seeded
from dreamkit.out_of_memory import ASK_LESS, enough_memory
from dreamkit.plugins import added_rules, build_registries
from dreamkit.recipe import build_entry
from dreamkit.recipe.defaults import entry_with_defaults
from dreamkit.recipe.problems import format_path
from dreamkit.registry import Registries
from dreamkit.report.notebook import LivePicture
from dreamkit.report.run_log import MemoryLog
from dreamkit.stages.opening import check_dreamed, open_evaluation, opened
from dreamkit.teachers.doubts import doubt_training
from dreamkit.types import (
    Application,
    Images,
    LatencyBackend,
    RunContext,
    RunFailed,
    RunStarted,
    Synthesis,
    Synthesizer,
    Teacher,
)


@dataclass(frozen=True)
class Conditions:
    """What every function of the library takes besides its own options.

    Args:
        view: how the network sees images, as far as the caller says it.
        seed: of everything random, 0 or more.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        progress: show notes and progress; None does on a terminal and in a notebook.
        out: a folder from which the same call goes on after an interruption; None keeps nothing.
        evaluation: labelled images to report accuracy on.
        latency_backend: times networks: a backend's name, its options or itself.
    """

    view: View
    seed: int = 0
    device: str = "auto"
    progress: bool | None = None
    out: str | Path | None = None
    evaluation: Any = None
    latency_backend: str | Mapping[str, Any] | LatencyBackend | None = None


@dataclass(frozen=True)
class Session:
    """A call under way.

    Args:
        teacher: a copy of the caller's network, on the device.
        context: where its work is done.
        log: of the context.
        registries: of everything installed.
        started: by ``time.perf_counter``.
        reported: what a recipe says of how the call reports: ``evaluation`` and ``latency``.
        out: the caller's folder, None for a temporary one.
        stack: of what is given back when the call ends.
    """

    teacher: Teacher
    context: RunContext
    log: MemoryLog
    registries: Registries
    started: float
    reported: Mapping[str, Any]
    out: Path | None
    stack: ExitStack

    def begin(self, settings: Mapping[str, Any], given: Sequence[str | None] = ()) -> None:
        """Claim the caller's folder, if there is one, and tell listeners of the start.

        Args:
            settings: of the result.
            given: hashes of images and networks that the work depends on.

        Raises:
            DreamkitError: the folder holds the work of another call.
        """
        told = plain(settings)
        application = settings["application"]
        whole = entry_with_defaults(self.registries, "applications", application)
        call = {
            "settings": {**told, "application": plain(whole)},
            "seed": self.context.seed,
            NETWORK: self.teacher.card.to_json(),
            "images or networks": list(given),
        }
        if self.out is not None:
            self.stack.enter_context(claimed(self.out, call))
        self.log.emit(RunStarted(folder=self.out, recipe=told))

    def application(
        self, name: str, options: Mapping[str, Any], function: Callable[..., Any]
    ) -> Application:
        """Build an application from keywords of a function, checked as a recipe's options are.

        Raises:
            RecipeError: an option is unknown or out of range; the message names it.
        """
        data = {**options, "name": name}
        made: Application = build_entry(self.registries, "applications", data, (), function)
        return made

    def images(self, given: Any, allow_foreign: bool = False) -> Images:
        """Return a caller's images at the size that the teacher takes.

        Raises:
            DreamkitError: they do not fit, or are dreams of another network.
        """
        source = GivenImages(given, "images", allow_foreign=allow_foreign)
        with placed("images"):
            check_dreamed(source, self.teacher.card)
        return opened(source, self.teacher.card, self.log.note)

    def synthesis(
        self, options: Mapping[str, Any], function: Callable[..., Any], path: RecipePath = ()
    ) -> Synthesis:
        """Return dreams to come, by a synthesizer whose options are given as in a recipe.

        Args:
            options: its own.
            function: that takes them as keywords, beside its own.
            path: what the caller calls them, if they are an argument of another function.

        Raises:
            DreamkitError: an option is unknown or out of range; the message names it.
        """
        synthesizer: Synthesizer = build_entry(
            self.registries, "synthesizers", dict(options), path, function
        )
        with placed(*path):
            synthesizer.check(self.teacher)
        whole = entry_with_defaults(self.registries, "synthesizers", dict(options))
        return Synthesis(synthesizer, plain(whole))


@contextmanager
def session(network: nn.Module | Teacher, conditions: Conditions) -> Iterator[Session]:
    """Take a network in, and set up where a call works.

    The network, torch's random numbers and the folder (unless ``out`` is one) stay as they are.

    Raises:
        DreamkitError: the network or a keyword cannot be used; the message names it.
    """
    started = time.perf_counter()
    if isinstance(conditions.seed, bool) or not isinstance(conditions.seed, int):
        raise DreamkitError(f"seed: should be a whole number (got {conditions.seed!r})")
    if not 0 <= conditions.seed < 2**63:
        raise DreamkitError(f"seed: should be 0 or more (got {conditions.seed})")
    registries = build_registries()
    device = choose_device(conditions.device)
    log = MemoryLog(_console(conditions.progress))
    for failure in registries.failures:
        log.note(f"plugin {failure.plugin} is left out: {failure.reason}")
    log.listen(registries.events(log.note).emit)
    if log.console is not None:
        log.listen(LivePicture(log.console, kept=conditions.out is not None))
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))  # what times models asks for it
        stack.enter_context(seeded(conditions.seed, device))
        stack.enter_context(freed_memory_kept())
        try:
            with enough_memory("working", ASK_LESS):
                yield _session(network, conditions, device, registries, log, stack, started)
        except BaseException as error:
            log.emit(RunFailed(error=error))
            if isinstance(error, DreamkitError) and error.path:
                message = f"{format_path(error.path)}: {error.message}"
                raise type(error)(message) from error
            raise


def _session(
    network: nn.Module | Teacher,
    conditions: Conditions,
    device: torch.device,
    registries: Registries,
    log: MemoryLog,
    stack: ExitStack,
    started: float,
) -> Session:
    teacher = take_in(network, conditions.view, log.note)
    if teacher.card.trained:
        doubt_training(teacher.model, log.note, "model")
    teacher.model.to(device)
    out = None if conditions.out is None else Path(conditions.out)
    folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dreamkit-")))
    evaluation = None
    if conditions.evaluation is not None:
        source = GivenImages(conditions.evaluation, "evaluation")
        evaluation = open_evaluation(source, teacher.card, log.note)
    latency = _backend(conditions.latency_backend, registries)
    latency = latency or default_backend(registries, device)
    rules = added_rules(registries, log.note)
    context = RunContext(conditions.seed, device, folder, log, latency, evaluation, rules)
    reported = _reported(conditions)
    return Session(teacher, context, log, registries, started, reported, out, stack)


def _console(progress: bool | None) -> Console | None:
    """Return where progress is shown: standard error, or the notebook's cell."""
    shown = Console(stderr=True)
    if progress is None:
        progress = shown.is_jupyter or sys.stderr.isatty()
    return shown if progress else None


def _backend(given: Any, registries: Registries) -> LatencyBackend | None:
    if given is None:
        return None
    path = ("latency_backend",)
    built: LatencyBackend = build_entry(registries, "latency_backends", given, path)
    return built


def _reported(conditions: Conditions) -> dict[str, Any]:
    given, found = conditions.latency_backend, dict[str, Any]()
    if given is not None:
        found["latency"] = {"name": given} if isinstance(given, str) else given
    if conditions.evaluation is not None:
        found["evaluation"] = GivenImages(conditions.evaluation, "evaluation")
    return found


def plain(value: Any) -> Any:
    """Return options as plain data; of an object that is none, how it shows itself."""
    if isinstance(value, GivenImages | GivenNetwork):
        return value.entry()
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # the same in the next process
