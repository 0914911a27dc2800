"""What the rooms pass to one another: small dataclasses and the protocols of each kind of entry.

Images are either *stored* (uint8, 0 to 255) or *normalised* (float, (pixel/255 - mean) / std per
channel, as the teacher was trained on). Shapes are (N, C, H, W) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dreamkit.card import Card


@dataclass
class Teacher:
    """A trained model in eval mode, its card, and how it is built without its weights.

    Args:
        model: in eval mode.
        card: of the model.
        builder: the recipe entry that builds it, unweighted.
        surgery: what was pruned of what that builds, as ``pruning.surgery`` writes it.
    """

    model: nn.Module
    card: Card
    builder: dict[str, Any]
    surgery: dict[str, Any] = field(default_factory=dict)


class TeacherSource(Protocol):
    """An entry of ``teachers``. Its constructor checks names and paths, and loads nothing."""

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""

    def load(self, seed: int) -> Teacher:
        """Return the trained model on the CPU; ``seed`` is for weights that are random."""


@dataclass(frozen=True)
class LayerStatistics:
    """What one BatchNorm layer saw of a batch, and what it stores of its training; each (C,)."""

    name: str
    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


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
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    student_logits: Tensor | None = None
    bn_statistics: tuple[LayerStatistics, ...] = ()
    features: Tensor | None = None


class Regularizer(Protocol):
    """An entry of ``regularizers``.

    A class that needs more than images, labels and teacher logits declares it:
    ``needs: ClassVar[frozenset[str]] = frozenset({"bn_statistics"})`` (or ``"student_logits"``,
    ``"features"``).
    """

    def __call__(self, step: InversionStep) -> Tensor:
        """Return the unweighted term, a scalar of shape ()."""


def needs(entry: object) -> frozenset[str]:
    """Return what an entry declares that it needs."""
    declared: frozenset[str] = getattr(entry, "needs", frozenset())
    return declared


class Parameterisation(Protocol):
    """An entry of ``parameterisations``: the tensor that an optimizer moves, and its images.

    ``render`` undoes ``encode`` and is differentiable. Images are normalised, (N, C, H, W).
    """

    def start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Return the parameters of random images of a shape, drawn on the CPU."""

    def encode(self, images: Tensor) -> Tensor:
        """Return parameters, a tensor of its own memory, whose images are these."""

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


@dataclass(frozen=True)
class Estimate:
    """What dreaming is expected to take: seconds, and bytes in use at the peak."""

    seconds: float
    memory_bytes: int


class Dreamer(Protocol):
    """A synthesizer bound to a teacher on a device, with every option settled.

    ``choices`` are those options that the recipe left to the machine and that dreams depend on,
    as plain data: given to the next session, they make the same dreams of the same plan.
    """

    @property
    def batch_size(self) -> int:
        """How many images are dreamed together."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """What was settled."""

    def prepare(self, images: int) -> Estimate:
        """Time a few steps, settle what depends on the time, and estimate the cost of images."""

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Synthesise one batch.

        Raises:
            NonFiniteLoss: there is nothing to keep of this batch; others may be dreamed.
        """

    def state(self) -> Mapping[str, Tensor]:
        """Return what is carried from batch to batch, such as a generator; empty if nothing is."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""


class Synthesizer(Protocol):
    """An entry of ``synthesizers``.

    One whose terms compete with a student that the recipe does not name says so:
    ``needs_student: str | None`` is the name of that term. Only an application that declares
    ``trains_student`` can use it.
    """

    images: int

    @property
    def steps_per_batch(self) -> int:
        """How often ``on_step`` is called for a batch."""

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that an option does not fit, before anything is written.

        Raises:
            TeacherMismatch: an option asks of the teacher what it does not have.
        """

    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
    ) -> AbstractContextManager[Dreamer]:
        """Bind to a teacher on ``device``; on leaving, the teacher is as it was.

        Args:
            teacher: on ``device``.
            device: where to work.
            choices: what an earlier session of the same work settled.
            note: told what the user must know.
            student: on ``device``, trained between dreams; each batch is dreamed against it as
                it then is, if the recipe names no other.
        """


NO_LABEL = -1
"""Stands for the class of an image whose class is not known."""


class Images(Protocol):
    """A set of stored images, all of one size, with labels (or ``NO_LABEL``)."""

    def __len__(self) -> int:
        """Return how many there are."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) and labels (N,) int64."""


@dataclass(frozen=True)
class StoredImages:
    """Images held in memory: stored images (N, C, H, W) uint8, labels and teacher logits."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images and labels."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


class ImageSource(Protocol):
    """An entry of ``sources``. Its constructor checks paths; ``open`` reads.

    One whose images have classes of their own tells their names in order, with a method
    ``class_names() -> tuple[str, ...] | None``.
    """

    def open(self, card: Card) -> Images:
        """Return the images at the card's input size and channels."""


@dataclass(frozen=True)
class IncrementalStep:
    """One step of learning new classes, as losses see it.

    Args:
        logits: of images of the new classes, (N, K): old classes first.
        old_logits: of the same images, by the network as it was, (N, K_old).
        labels: (N,) int64, in [K_old, K).
        replay_logits: of images of the old classes, (M, K); None where there are none.
        replay_old_logits: of those, by the network as it was, (M, K_old).
        replay_labels: (M,) int64, in [0, K_old), or ``NO_LABEL``.
    """

    logits: Tensor
    old_logits: Tensor
    labels: Tensor
    replay_logits: Tensor | None = None
    replay_old_logits: Tensor | None = None
    replay_labels: Tensor | None = None


class IncrementalLoss(Protocol):
    """An entry of ``losses``.

    One that looks at images of old classes declares it:
    ``needs: ClassVar[frozenset[str]] = frozenset({"replay"})``.
    """

    def __call__(self, step: IncrementalStep) -> Tensor:
        """Return the unweighted loss, a scalar of shape ()."""


@dataclass(frozen=True)
class Member:
    """A layer's share in a channel group.

    ``index[i]`` is the layer's channel that belongs to the group's channel ``channel[i]``.
    """

    layer: str
    axis: str  # "out", "in", "parameter", or "attribute:NAME" for a number that a module keeps
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, e.g. those that meet in a residual sum."""

    name: str
    channels: int
    members: tuple[Member, ...]

    def shapes_without(
        self, shapes: Mapping[str, LayerShape], channels: int
    ) -> dict[str, LayerShape]:
        """Return what becomes of this group's layers once some of its channels are gone.

        Args:
            shapes: by name, of the model's convolutions and linear layers.
            channels: how many go.
        """
        after: dict[str, LayerShape] = {}
        for member in self.members:
            if member.layer in shapes:
                # A flattened feature map gives a linear layer several inputs for each channel.
                gone = round(channels * len(member.index) / self.channels)
                shape = after.get(member.layer, shapes[member.layer])
                after[member.layer] = shape.without(member.axis, gone)
        return after


@dataclass(frozen=True)
class PruningStep:
    """The state of a pruning run, as criteria see it before each removal.

    Args:
        model: the model being pruned.
        teacher: the model it started from, in eval mode.
        groups: what may be removed; those that the limits leave alone from the start are not there.
        card: the teacher's card.
        chunks: of each group, how many channels may go together, one lot after the other.
        device: where the model is.
        batches: yields normalised images (N, C, H, W) and labels (N,), a fixed few batches.
        latency: times modules on the target.
        generator: for anything random in a criterion.
        earlier: what the same criterion said of these channels the step before; None at first.
    """

    model: nn.Module
    teacher: nn.Module
    groups: Sequence[ChannelGroup]
    card: Card
    chunks: Sequence[Sequence[int]]
    device: torch.device
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    latency: LatencyTable
    generator: torch.Generator
    earlier: Sequence[Tensor] | None = None


class Criterion(Protocol):
    """An entry of ``criteria``.

    One that cannot score every group says so before anything is dreamed:
    ``check(model: nn.Module, groups: Sequence[ChannelGroup]) -> None`` raises ``NothingToPrune``.
    """

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return for each group its channels' importance (channels,); the lowest go first."""


@dataclass(frozen=True)
class LayerShape:
    """A layer at one input: the key of a latency look-up table.

    ``kind`` is ``conv``, ``linear`` or ``norm``: a BatchNorm of ``c_out`` channels, together with
    the activation module that follows it.
    """

    kind: str
    c_in: int
    c_out: int
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False
    feature_map: tuple[int, ...] = ()
    activation: str = ""

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a filter of its own."""
        return self.kind == "conv" and self.groups > 1 and self.groups == self.c_in == self.c_out

    @property
    def params(self) -> int:
        """Weights and biases."""
        if self.kind == "norm":
            return 2 * self.c_out
        weights = self.c_in // self.groups * self.c_out * math.prod(self.kernel)
        return weights + (self.c_out if self.bias else 0)

    @property
    def flops(self) -> int:
        """Multiply-adds for one image, each counted once; those of a BatchNorm are not."""
        if self.kind == "norm":
            return 0
        spots = 1
        if self.kind == "conv":
            for size, kernel, stride, padding, dilation in zip(
                self.feature_map, self.kernel, self.stride, self.padding, self.dilation, strict=True
            ):
                spots *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return spots * self.c_in // self.groups * self.c_out * math.prod(self.kernel)

    def without(self, axis: str, channels: int) -> LayerShape:
        """Return the shape with fewer channels on one axis; depthwise layers lose on both."""
        if self.kind == "norm":
            left = max(self.c_out - channels, 1)
            return replace(self, c_in=left, c_out=left)
        if self.depthwise:
            left = self.c_out if axis == "in" else max(self.c_out - channels, 1)
            return replace(self, c_in=left, c_out=left, groups=left)
        if axis == "out":
            return replace(self, c_out=max(self.c_out - channels, 1))
        return replace(self, c_in=max(self.c_in - channels, 1))


class LatencyTable(Protocol):
    """Predicts how long a model takes on the target.

    ``block`` is how many channels the target computes together.
    """

    block: int

    def prepare(self, shapes: Iterable[LayerShape]) -> None:
        """Measure what predicting these layers asks for, together rather than one by one."""

    def predict(self, shape: LayerShape) -> float:
        """Return one layer's latency in milliseconds."""

    def shapes(self, model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
        """Return the shape of every layer of a model that counts, by name."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per forward pass: the median, and the middle half's width."""

    median_ms: float
    spread_ms: float


class LatencyBackend(Protocol):
    """An entry of ``latency_backends``.

    A runtime that folds BatchNorm into convolutions says so:
    ``folds_norms: ClassVar[bool] = True``; one that computes channels in blocks, and is slower
    where they are not filled, says how many there are in one: ``channel_block: int``.
    """

    batch_size: int

    def describe(self) -> dict[str, str]:
        """Return what the figures hold for: processor, runtime, dtype, threads, batch."""

    def time(self, modules: Sequence[tuple[nn.Module, Tensor]]) -> list[Timing]:
        """Time modules, each on its input, in turn within one run."""


class Tracker(Protocol):
    """An entry of ``trackers``."""

    def start(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Begin a run."""

    def record(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Take one record; a number that is not finite comes as None."""

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Take the final metrics and close."""


class RunLog(Protocol):
    """Where an application reports what it does."""

    def record(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write one line to ``log.jsonl`` and to every tracker."""

    def begin(self, stage: str) -> None:
        """Forget what an interrupted try recorded under a stage that starts afresh."""

    def note(self, text: str) -> None:
        """Say something the user must know; it also stands in the report."""

    def progress(self, stage: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show progress of ``total`` units; the callable takes how many are done. Times it."""

    def check(self, together: bool = False) -> None:
        """Raise KeyboardInterrupt if the run is to stop; call it where nothing is lost by that.

        Args:
            together: every rank comes here, and stops if one is to.
        """


@dataclass
class RunContext:
    """What an application works with, and where it leaves its results.

    Args:
        recipe: the resolved recipe as plain data.
        seed: the recipe's.
        device: where models work.
        folder: the run directory.
        teacher: on ``device``, in eval mode.
        synthesizer: None where the recipe has none.
        evaluation: real images, None where the recipe has none.
        latency: times models on the target.
        log: records, notes and progress.
        metrics: dotted names to numbers; accuracies in [0, 1], latencies in ms.
        details: anything else worth keeping in ``report.json``.
        failures: what was asked for and not reached; the run is kept, and ends with status 1.
    """

    recipe: Mapping[str, Any]
    seed: int
    device: torch.device
    folder: Path
    teacher: Teacher
    synthesizer: Synthesizer | None
    evaluation: Images | None
    latency: LatencyBackend
    log: RunLog
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    DREAMS: ClassVar[str] = "dreams"
    STUDENT: ClassVar[str] = "student"
    CHECKPOINTS: ClassVar[str] = "checkpoints"
    TABLE: ClassVar[str] = "latency_lut.json"


class Application(Protocol):
    """An entry of ``applications``.

    ``needs_synthesis: bool`` says whether it dreams (a recipe without ``synthesis`` is refused),
    ``trains_student: bool``, where there is one, whether it dreams against a student in training;
    if so, ``make_student(context) -> Teacher`` builds that student, untrained. One that dreams
    otherwise than ``synthesis`` says has ``planned(context) -> RunContext``: its dreaming costs the
    same.
    """

    def run(self, context: RunContext) -> None:
        """Do the work; numbers go to ``context.metrics``, files to ``context.folder``."""
