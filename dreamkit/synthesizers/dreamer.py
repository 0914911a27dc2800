"""What the synthesizers of this package do alike: dream batches by a loss bound to a teacher."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamkit.arithmetic import resolve_precision
from dreamkit.errors import DreamkitError, NonFiniteLoss
from dreamkit.memory import largest_batch
from dreamkit.model_state import frozen
from dreamkit.synthesizers.engine import Engine, Evaluator, compile_seconds
from dreamkit.synthesizers.inversion_loss import InversionLoss
from dreamkit.synthesizers.planning import Phase, compile_phases, prepare
from dreamkit.types import BatchPlan, Dream, Estimate, OnImages, OnStep, Parameterisation, Teacher
from dreamkit.wording import and_more


@dataclass(frozen=True)
class Session:
    """What a synthesizer dreams with.

    Args:
        teacher: frozen, on ``device``.
        loss: of the teacher, and of the competitor on ``device`` if there is one.
        device: where to work.
        choices: what an earlier session resolved.
        note: told what the user must know.
        seed: of what is drawn once for all batches.
    """

    teacher: Teacher
    loss: InversionLoss
    device: torch.device
    choices: Mapping[str, Any]
    note: Callable[[str], None]
    seed: int = 0


class LossDreamer(ABC):
    """A synthesizer bound to a frozen teacher on a device, which dreams by an inversion's loss.

    Args:
        engine: how the recipe wants it computed.
        session: what it works with.
    """

    def __init__(self, engine: Engine, session: Session) -> None:
        self.teacher = session.teacher
        self.terms = session.loss
        self.student = session.loss.student
        self.device = session.device
        self.note = session.note
        self.on_images: OnImages = _unseen
        choices = session.choices
        precision = choices.get("precision", engine.precision)
        self.engine = Engine(
            precision=resolve_precision(precision, self.device, self.teacher.model, inverted=True),
            compile=choices.get("compile", engine.compile),
        )
        self.evaluator = self.engine.evaluator(self.terms, self.device, self.note)

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """How many images are dreamed together."""

    @property
    def choices(self) -> dict[str, Any]:
        """The batch size and how the engine computes; plain data."""
        return {
            "batch_size": self.batch_size,
            "precision": self.evaluator.precision,
            "compile": self.engine.compile is True,
        }

    @abstractmethod
    def make(self, plan: BatchPlan, evaluator: Evaluator, on_step: OnStep) -> Dream:
        """Make one batch.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Return what a full batch consists of."""

    def watch(self, on_images: OnImages) -> None:
        """Call back after each step of ``dream`` from now on."""
        self.on_images = on_images

    def state(self) -> dict[str, Tensor]:
        """Return what is carried from batch to batch: nothing, if a batch is its seed's alone."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned: nothing.

        Raises:
            DreamkitError: there is something, which another synthesizer carried on.
        """
        if state:
            raise DreamkitError(
                f"what was kept between batches ({and_more(sorted(state))}) is of another "
                "synthesizer: remove the run's folder 'dreams'"
            )

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Make one batch; one whose loss overflows starts once more from its seed, in float32.

        Raises:
            NonFiniteLoss: it overflowed there too; what is carried on is as before.
        """
        with self.rival_frozen(), self._undone_on_overflow():
            try:
                with self._undone_on_overflow():
                    return self.make(plan, self.evaluator, on_step)
            except NonFiniteLoss as error:
                if self.evaluator.exact:
                    raise
                self.note(f"{error.message}; once more in float32")
            exact = Engine(precision="float32", compile=False).evaluator(self.terms, self.device)
            return self.make(plan, exact, on_step)

    @contextmanager
    def _undone_on_overflow(self) -> Iterator[None]:
        before = {name: value.detach().clone() for name, value in self.state().items()}
        try:
            yield
        except NonFiniteLoss:
            self.restore(before)
            raise

    def prepare(self, images: int) -> Estimate:
        """Time a few steps, compile if that pays, and estimate the cost.

        Args:
            images: how many are to be dreamed.

        Returns:
            Seconds for all of them, compilation included; peak memory of a step.
        """
        before = {name: value.detach().clone() for name, value in self.state().items()}
        try:
            with self.rival_frozen():
                self.engine, estimate = prepare(
                    self.engine,
                    self.evaluator,
                    self.phases(),
                    images / self.batch_size,
                    compile_seconds(self.teacher.model),
                    self.note,
                )
        finally:
            self.restore(before)
        return estimate

    def compile(self) -> str | None:
        """Compile for full batches of every phase; return why that did not work, if so."""
        with self.rival_frozen():
            return compile_phases(self.evaluator, self.phases())

    def largest_batch(self, most: int, size: tuple[int, int]) -> int:
        """Return how many images of a size fit together into memory, ``most`` at the most."""
        shape, device = (self.teacher.card.input_size[0], *size), self.device

        def trial(count: int) -> None:
            images = torch.zeros(count, *shape, device=device)
            labels = torch.zeros(count, dtype=torch.int64, device=device)
            self.evaluator(images, labels, torch.zeros(3, dtype=torch.int64, device=device))

        with self.rival_frozen():
            found = largest_batch(trial, most, device)
        self.note(f"batch_size: auto is {found} on this machine")
        return found

    @contextmanager
    def rival_frozen(self) -> Iterator[None]:
        """Keep the student frozen; it may be one that is trained between dreams."""
        with frozen(self.student) if self.student is not None else nullcontext():
            yield


def clipped(
    parameterisation: Parameterisation,
    parameters: Tensor,
    size: tuple[int, int],
    limits: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the parameters of images with their pixels within limits, if there are."""
    if limits is None:
        return parameters.detach()
    with torch.no_grad():
        images = parameterisation.render(parameters, size)
        return parameterisation.encode(images.clamp(*limits))


def _unseen(images: Tensor, labels: Tensor) -> None:
    """Nobody looks."""


class Best:
    """The best so far of what steps found, without a look from the host.

    Args:
        start: stands for the best until there is one.
    """

    def __init__(self, start: Tensor) -> None:
        self.found = start
        self.loss = torch.tensor(torch.inf, device=start.device)
        self.finite = torch.tensor(True, device=start.device)
        """Whether every loss was, a tensor of shape ()."""
        self._terms: tuple[str, ...] = ()
        self._sound: Tensor | None = None
        """Whether each term was, at the first step whose loss was not; (terms,)."""

    def anew(self) -> Best:
        """Return one that takes what comes next; it still knows whether all losses were finite."""
        other = copy.copy(self)
        other.loss = torch.full_like(self.loss, torch.inf)
        return other

    def offer(self, found: Tensor, loss: Tensor, terms: Mapping[str, Tensor] | None = None) -> None:
        """Take what a step found, if its loss (of shape ()) is lower.

        Args:
            found: by the step.
            loss: of shape ().
            terms: that it is the sum of, to name those that are not finite.
        """
        if terms:  # together: each step waits for as many kernels as there are
            self._terms, sound = tuple(terms), torch.stack([*terms.values()]).isfinite()
            before = sound if self._sound is None else self._sound
            self._sound = torch.where(self.finite, sound, before)
        better = loss < self.loss
        self.found = torch.where(better, found.detach(), self.found)
        self.loss = torch.where(better, loss.detach(), self.loss)
        self.finite = self.finite & torch.isfinite(loss)

    def require_finite(self, plan: BatchPlan) -> None:
        """Look whether all steps were sound; it waits for the device.

        Raises:
            NonFiniteLoss: one was not.
        """
        if not self.finite:
            told = [] if self._sound is None else self._sound.tolist()
            first = [name for name, sound in zip(self._terms, told, strict=True) if not sound]
            named = f" (not finite first: {', '.join(first)})" if first else ""
            raise NonFiniteLoss(
                f"the loss of batch {plan.index} is not finite: lower the learning rate or the "
                f"weights of the regularizers{named}"
            )
