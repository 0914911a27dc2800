"""What the generator methods share: their options, their session, and a generator's step.

They minimise the loss of an inversion (``inversion_loss``) through a generator: the engine gives
the gradient in the images, and autograd carries it on to the generator and its noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.arithmetic import autocast
from dreamkit.errors import NonFiniteLoss
from dreamkit.model_state import seeded
from dreamkit.registry import Term, TermsOf
from dreamkit.synthesizers.dreamer import LossDreamer, Session
from dreamkit.synthesizers.engine import Engine, Evaluator
from dreamkit.synthesizers.generator_network import Generator
from dreamkit.synthesizers.inversion_loss import bound_loss, check_terms, competing
from dreamkit.synthesizers.planning import Phase
from dreamkit.synthesizers.views import draw_views
from dreamkit.types import BatchPlan, Dream, OnStep, Regularizer, Synthesizer, Teacher

BETAS = (0.5, 0.999)
"""Adam's, for generators that are adapted to a batch."""


@dataclass(frozen=True, kw_only=True)
class Generative(Synthesizer):
    """The options that generator methods have in common.

    Args:
        images: how many to dream.
        regularizers: the weighted terms beside the cross-entropy.
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

    regularizers: Annotated[tuple[Term[Regularizer], ...], TermsOf("regularizers")]
    images: Annotated[int, Field(ge=1)] = 1024
    batch_size: Annotated[int, Field(ge=2)] = 256
    steps: Annotated[int, Field(ge=1)] = 5
    latent: Annotated[int, Field(ge=1)] = 256
    width: Annotated[int, Field(ge=1)] = 64
    jitter: Annotated[int, Field(ge=0)] | None = None
    flip: bool = False
    engine: Engine = field(default_factory=Engine)

    dreamer: ClassVar[type[GenerativeDreamer]]

    @property
    @abstractmethod
    def label_weight(self) -> float:
        """Weight of the cross-entropy to the labels."""

    @property
    def steps_per_batch(self) -> int:
        """Generator steps for each batch of dreams."""
        return self.steps

    @property
    def needs_student(self) -> str | None:
        """The term that competes with a student, if one does."""
        return competing(self.regularizers)

    def known_batch_size(self, teacher: Teacher) -> int:
        """Return the batch size."""
        return self.batch_size

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
        seed: int = 0,
    ) -> Iterator[GenerativeDreamer]:
        """Freeze the teacher and tap its statistics; on leaving it is as it was."""
        self.check(teacher)
        with ExitStack() as stack:
            loss = stack.enter_context(
                bound_loss(teacher, self.regularizers, student, self.label_weight)
            )
            dreamer = self.dreamer(self, Session(teacher, loss, device, choices or {}, note, seed))
            stack.callback(dreamer.evaluator.discard_compiled)
            yield dreamer


class GenerativeDreamer(LossDreamer):
    """A generator method bound to a frozen teacher on a device.

    Args:
        options: the recipe's.
        session: what it works with.
    """

    first_whole_batch = 0
    """The first batch on which every term counts: what others cost is told from it."""

    def __init__(self, options: Generative, session: Session) -> None:
        super().__init__(options.engine, session)
        card = session.teacher.card
        self.shape = card.input_size
        self.pixels = card.pixel_range(torch.zeros((), device=session.device))
        self._common = options

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""
        return self._common.batch_size

    def make(self, plan: BatchPlan, evaluator: Evaluator, on_step: OnStep) -> Dream:
        """Make one batch.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """
        return self.take_steps(plan, self._common.steps, evaluator, on_step)

    @abstractmethod
    def take_steps(
        self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Make a batch in some generator steps.

        Raises:
            NonFiniteLoss: its loss overflowed.
        """

    def phases(self) -> list[Phase]:
        """Return the steps of a batch."""
        plan = BatchPlan(self.first_whole_batch, 0, self.batch_size, 0)

        def run(steps: int, on_step: OnStep) -> None:
            with suppress(NonFiniteLoss):  # only the time counts here
                self.take_steps(plan, steps, self.evaluator, on_step)

        draws = torch.Generator().manual_seed(0)
        labels = self.labels(self.batch_size, draws)
        with torch.no_grad():
            noise = self.noise(self.batch_size, draws)
            sample = self.render(self.new_generator(0), noise, self.evaluator)
        return [Phase(self._common.steps, run, sample, labels)]

    # --- for the methods ----------------------------------------------------------------------

    def new_generator(self, seed: int) -> Generator:
        """Return an untrained generator on the device, in training mode."""
        with seeded(seed):
            made = Generator(self._common.latent, self._common.width, self.shape)
        made.train()
        return made.to(self.device)

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

    def render(self, network: nn.Module, noise: Tensor, evaluator: Evaluator) -> Tensor:
        """Return the normalised images (N, C, H, W) of noise, with gradients."""
        with autocast(evaluator.precision, self.device):
            pixels = network(noise)
        low, high = self.pixels
        images: Tensor = low + pixels.float() * (high - low)
        return images
