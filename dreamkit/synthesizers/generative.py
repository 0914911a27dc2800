"""What the generator methods share: their options, their session, and a generator's step.

They minimise the loss of an inversion (``inversion_loss``) through a generator: the engine gives
the gradient in the images, and autograd carries it on to the generator and its noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.arithmetic import autocast
from dreamkit.errors import NonFiniteLoss
from dreamkit.model_state import frozen, seeded
from dreamkit.registry import Term, TermsOf
from dreamkit.synthesizers.engine import Engine, Evaluation, Evaluator, compile_seconds
from dreamkit.synthesizers.generator_network import Generator
from dreamkit.synthesizers.inversion_loss import InversionLoss, bound_loss, check_terms, competing
from dreamkit.synthesizers.planning import Phase, prepare
from dreamkit.synthesizers.views import draw_views
from dreamkit.types import BatchPlan, Dream, Estimate, OnStep, Regularizer, Teacher


@dataclass(frozen=True, kw_only=True)
class Generative(ABC):
    """The options that generator methods have in common.

    Args:
        images: how many to dream.
        regularizers: the weighted terms beside the cross-entropy.
        cross_entropy: weight of the cross-entropy to the labels.
        batch_size: images made together, over which feature statistics are taken.
        steps: generator steps for each batch of dreams.
        latent: size of the generator's noise.
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees; null is an eighth of the
            side (4 at 32×32).
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        engine: how the teacher is computed.
    """

    images: Annotated[int, Field(ge=1)]
    regularizers: Annotated[tuple[Term[Regularizer], ...], TermsOf("regularizers")]
    cross_entropy: Annotated[float, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=2)] = 256
    steps: Annotated[int, Field(ge=1)] = 5
    latent: Annotated[int, Field(ge=1)] = 256
    width: Annotated[int, Field(ge=1)] = 64
    jitter: Annotated[int, Field(ge=0)] | None = None
    flip: bool = False
    engine: Engine = field(default_factory=Engine)

    dreamer: ClassVar[type[GenerativeDreamer]]

    @property
    def steps_per_batch(self) -> int:
        """Generator steps for each batch of dreams."""
        return self.steps

    @property
    def needs_student(self) -> str | None:
        """The term that competes with a student, if one does."""
        return competing(self.regularizers)

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that the terms do not fit."""
        check_terms(self.regularizers, teacher)

    @contextmanager
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
    ) -> Iterator[GenerativeDreamer]:
        """Freeze the teacher and tap its statistics; on leaving it is as it was."""
        self.check(teacher)
        with ExitStack() as stack:
            loss = stack.enter_context(
                bound_loss(teacher.model, self.regularizers, student, self.cross_entropy)
            )
            dreamer = self.dreamer(self, teacher, loss, device, choices or {}, note)
            stack.callback(dreamer.evaluator.discard_compiled)
            yield dreamer


class GenerativeDreamer(ABC):
    """A generator method bound to a frozen teacher on a device.

    Args:
        options: the recipe's.
        teacher: frozen, on ``device``.
        loss: of the teacher, and of the student in training on ``device`` if there is one.
        device: where to work.
        choices: what an earlier session settled.
        note: told what the user must know.
    """

    def __init__(
        self,
        options: Generative,
        teacher: Teacher,
        loss: InversionLoss,
        device: torch.device,
        choices: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.teacher = teacher
        self.loss = loss
        self.student = loss.student
        self.device = device
        self.note = note
        self.shape = teacher.card.input_size
        self._batch_size = options.batch_size
        self._common = options
        settled = {"precision": options.engine.precision, "compile": options.engine.compile}
        self.engine = Engine(**(settled | {k: choices[k] for k in settled if k in choices}))
        self.evaluator = self.engine.evaluator(loss, device)

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""
        return self._batch_size

    @property
    def choices(self) -> dict[str, Any]:
        """How the engine computes; plain data."""
        return {"precision": self.evaluator.precision, "compile": self.engine.compile is True}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what is carried from batch to batch."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""

    @abstractmethod
    def make(self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep) -> Dream:
        """Make a batch in some generator steps.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Make one batch; one that overflows is made once more from its seed, in float32.

        Raises:
            NonFiniteLoss: it overflowed there too; what is carried on is as before.
        """
        before, steps = _copied(self.state()), self._common.steps
        exact = Engine(precision="float32", compile=False).evaluator(self.loss, self.device)
        with self._rival():
            try:
                return self.make(plan, steps, self.evaluator, on_step)
            except NonFiniteLoss as error:
                self.restore(before)
                if self.evaluator.exact:
                    raise
                self.note(f"{error.message}; once more in float32")
            try:
                return self.make(plan, steps, exact, on_step)
            except NonFiniteLoss:
                self.restore(before)
                raise

    def prepare(self, images: int) -> Estimate:
        """Time a few steps, compile if that pays, and estimate the cost of images."""
        before = _copied(self.state())
        plan = BatchPlan(0, 0, self.batch_size, 0)

        def run(steps: int, on_step: OnStep) -> None:
            self.make(plan, steps, self.evaluator, on_step)

        blank = torch.zeros(self.batch_size, *self.shape, device=self.device)
        labels = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        try:
            with self._rival():
                self.engine, estimate = prepare(
                    self.engine,
                    self.evaluator,
                    [Phase(self._common.steps, run, blank, labels)],
                    images / self.batch_size,
                    compile_seconds(self.teacher.model),
                    self.note,
                )
        finally:
            self.restore(before)
        return estimate

    @contextmanager
    def _rival(self) -> Iterator[None]:
        """Keep the student frozen; it is trained between dreams."""
        with frozen(self.student) if self.student is not None else nullcontext():
            yield

    # --- for the methods ----------------------------------------------------------------------

    def new_generator(self, seed: int) -> Generator:
        """Return an untrained generator on the device, in training mode."""
        with seeded(seed):
            made = Generator(self._common.latent, self._common.width, self.shape)
        return made.to(self.device).train()

    def noise(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw noise (N, latent) from N(0, 1)."""
        return torch.randn(size, self._common.latent, generator=generator).to(self.device)

    def labels(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw labels (N,) uniformly."""
        classes = self.teacher.card.num_classes
        return torch.randint(classes, (size,), generator=generator).to(self.device)

    def views(self, steps: int, generator: torch.Generator) -> Tensor:
        """Draw each step's roll and mirror."""
        jitter, (_, height, width) = self._common.jitter, self.shape
        shift = (height // 8, width // 8) if jitter is None else (jitter, jitter)
        return draw_views(steps, shift, self._common.flip, generator).to(self.device)

    def render(self, network: nn.Module, noise: Tensor) -> Tensor:
        """Return the normalised images (N, C, H, W) of noise, with gradients."""
        with autocast(self.evaluator.precision, self.device):
            pixels = network(noise)
        low, high = self.teacher.card.pixel_range(noise)
        images: Tensor = low + pixels.float() * (high - low)
        return images

    def descend(
        self, evaluator: Evaluator, images: Tensor, labels: Tensor, draw: Tensor, index: int
    ) -> Evaluation:
        """Evaluate the loss at images, and carry its gradient back to what made them.

        Raises:
            NonFiniteLoss: it is not finite; ``index`` is the batch's.
        """
        found = evaluator(images, labels, draw)
        if not torch.isfinite(found.loss):
            raise NonFiniteLoss(
                f"the loss of batch {index} is not finite: lower the learning rate or the weights "
                "of the regularizers"
            )
        images.backward(found.gradient)
        return found


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
