"""One inversion: what regularizers see, what is dreamed, and who dreams it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from dreamkit.types.layer_statistics import LayerStatistics, NormMeans
from dreamkit.types.models import Teacher
from dreamkit.types.needs import check_needs

Need = Literal["bn_statistics", "student_logits", "features", "block_outputs", "norm_means"]
"""What a regularizer may ask for; it is computed for those alone that do."""


@dataclass(frozen=True)
class InversionStep:
    """One step of an inversion, as regularizers see it.

    Args:
        images: (N, C, H, W), normalised; gradients flow to it.
        labels: (N,) int64, the class each image is to show.
        teacher_logits: (N, K).
        student_logits: (N, K), only when a regularizer needs them.
        bn_statistics: one for each BatchNorm layer in forward order, only when needed.
        features: (N, F), the input of the teacher's last linear layer, only when needed.
        block_outputs: what each block of the teacher puts out, in forward order, (N, P, C): the
            channels of P patches (tokens, or positions of a map), only when needed.
        norm_means: one for each LayerNorm and GroupNorm in forward order, only when needed.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    student_logits: Tensor | None = None
    bn_statistics: tuple[LayerStatistics, ...] = ()
    features: Tensor | None = None
    block_outputs: tuple[Tensor, ...] = ()
    norm_means: tuple[NormMeans, ...] = ()


class Regularizer(ABC):
    """An entry of ``regularizers``: a term of the loss that images are dreamed by."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What of a step it looks at beyond images, labels and teacher logits."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        check_needs(cls, get_args(Need))

    @abstractmethod
    def __call__(self, step: InversionStep) -> Tensor:
        """Return the unweighted term, a scalar of shape ()."""


class Parameterisation(ABC):
    """An entry of ``parameterisations``: the tensor that an optimizer moves, and its images.

    ``render`` undoes ``encode`` and is differentiable. Images are normalised, (N, C, H, W).
    """

    @abstractmethod
    def start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Return the parameters of random images of a shape, drawn on the CPU."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return parameters, a tensor of its own memory, whose images are these."""

    @abstractmethod
    def render(self, parameters: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images of parameters; ``size`` is their height and width."""


@dataclass(frozen=True)
class BatchPlan:
    """One unit of synthesis. Everything random in it comes from ``seed`` alone."""

    index: int
    first_image: int
    size: int
    seed: int


@dataclass(frozen=True)
class Dream:
    """One synthesised batch: normalised images (N, C, H, W), their labels (N,), the best loss."""

    images: Tensor
    labels: Tensor
    loss: float


OnStep = Callable[[int, Mapping[str, Tensor]], None]
"""Called after each step with the steps done in this batch and the loss's detached terms."""

OnImages = Callable[[Tensor, Tensor], None]
"""Called after each step with the images that it looked at (N, C, H, W), normalised, and labels.

The images may be smaller than the finished ones, and are the caller's: take a copy to keep.
"""


@dataclass(frozen=True)
class Estimate:
    """What dreaming is expected to take: seconds, and bytes in use at the peak."""

    seconds: float
    memory_bytes: int


class Dreamer(Protocol):
    """A synthesizer bound to a teacher on a device, with every option resolved.

    ``choices`` are those options that the recipe left to the machine and that dreams depend on,
    as plain data: given to the next session, they make the same dreams of the same plan.
    """

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """What was resolved."""

    def prepare(self, images: int) -> Estimate:
        """Time a few steps, resolve what depends on the time, and estimate the cost of images."""

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Synthesise one batch.

        Raises:
            NonFiniteLoss: there is nothing to keep of this batch; others may be dreamed.
        """

    def state(self) -> Mapping[str, Tensor]:
        """Return what is carried from batch to batch, such as a generator; empty if nothing is."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""


@runtime_checkable
class Watchable(Protocol):
    """What a dreamer may have besides, that lets a user see a batch while it is made."""

    def watch(self, on_images: OnImages) -> None:
        """Call back after each step of ``dream`` from now on.

        Hand over what the step has anyway. Dreams are the same whether anyone looks or not.
        """


@runtime_checkable
class TakingTurns(Protocol):
    """What a dreamer has besides whose batches others make in turn, each of sizes of its own."""

    @property
    def dreamers(self) -> Sequence[Dreamer]:
        """Those who make them, one for each of the synthesizer's ``members``."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Images of every batch of the run, in order."""


class Synthesizer(ABC):
    """An entry of ``synthesizers``: a way to dream images from a teacher.

    It has the option ``images``: how many to dream.
    """

    images: int

    @property
    @abstractmethod
    def steps_per_batch(self) -> int:
        """How often ``on_step`` is called for a batch."""

    @property
    def needs_student(self) -> str | None:
        """The name of a term that competes with a student which the recipe does not name.

        Only an application that trains a student can use a synthesizer with one.
        """
        return None

    @property
    def members(self) -> Sequence[Synthesizer]:
        """Those that dream, each with its number of images: itself, unless it stands for others."""
        return (self,)

    def image_size(self, teacher: Teacher) -> tuple[int, int]:
        """Return height and width of its images: the teacher's input size."""
        return teacher.card.input_size[1:]

    def known_batch_size(self, teacher: Teacher) -> int | None:
        """Return how many images are dreamed together; None if a session settles it."""
        return None

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that an option does not fit, before anything is written.

        Raises:
            TeacherMismatch: an option asks of the teacher what it does not have.
        """

    @abstractmethod
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
        seed: int = 0,
    ) -> AbstractContextManager[Dreamer]:
        """Bind to a teacher on ``device``; on leaving, the teacher is as it was.

        Args:
            teacher: on ``device``.
            device: where to work.
            choices: what an earlier session of the same work resolved.
            note: told what the user must know.
            student: on ``device``, trained between dreams; each batch is dreamed against it as
                it then is, if the recipe names no other.
            seed: the run's, of what is drawn once for all batches, as a generator's first weights.
        """


@dataclass(frozen=True)
class Synthesis:
    """Images that are still to be dreamed: who dreams them, and what tells them from others.

    Args:
        synthesizer: with its options.
        settings: the same as plain data. Dreams that were made with others are not mixed in.
    """

    synthesizer: Synthesizer
    settings: Mapping[str, Any]

    def of(self, images: int) -> Synthesis:
        """Return the same dreaming of another number of images."""
        return replace(self, synthesizer=with_images(self.synthesizer, images))


def with_images(synthesizer: Synthesizer, images: int) -> Synthesizer:
    """Return a synthesizer of another number of images."""
    other = copy.copy(synthesizer)
    object.__setattr__(other, "images", images)  # entries are frozen, and some no dataclasses
    return other
