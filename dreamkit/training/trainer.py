"""A student in training beside a frozen teacher: what every way of teaching has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dreamkit import distributed
from dreamkit.arithmetic import autocast, resolve_precision
from dreamkit.card import Card
from dreamkit.compilation import quiet_compiler, reason_of, with_cache_of_its_own
from dreamkit.errors import DreamkitError
from dreamkit.flat_state import below, optimizer_state, prefixed, restore_optimizer
from dreamkit.model_state import load_state, tensors_of
from dreamkit.seeds import stream
from dreamkit.training.augmenter import Augmenter, check_window
from dreamkit.training.batches import NormalisedBatches, drawn_evenly
from dreamkit.training.difference_statistics import Kept, check_made_from, stating
from dreamkit.training.layout import lay_out, overruns
from dreamkit.training.options import Training
from dreamkit.training.reading import Batch
from dreamkit.training.statistics import take_statistics
from dreamkit.types import Images

Options = TypeVar("Options", bound=Training)
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def _unseen(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


class Trainer(ABC, Generic[Options]):
    """A student in training, step by step; its state can be saved and restored.

    Args:
        student: trained in place; takes the teacher's images.
        teacher: frozen, and in eval mode.
        card: how to normalise stored images.
        options: hyper-parameters.
        device: where both models are.
        seed: of what is drawn: augmentation, and the images that ``statistics`` are taken over.
        total: steps in all.
        note: told if compilation fails, and of layers without statistics to take.
        kept: which of the teacher's channels the student has, as ``take_difference`` takes it.

    Raises:
        DreamkitError: the student has no layers of the teacher's, and is to have its statistics.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        card: Card,
        options: Options,
        device: torch.device,
        seed: int,
        total: int,
        note: Callable[[str], None] = lambda text: None,
        kept: Kept = MappingProxyType({}),
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.card = card
        self.options = options
        self.device = device
        self.seed = seed
        self.total = total
        self.note = note
        self.kept = kept
        self.done = 0
        self.network: nn.Module = student
        """The student, with its gradients averaged over ranks where there are several."""
        if options.statistics == "difference":
            check_made_from(student, teacher, kept)
        for network, role in ((teacher, "teacher"), (student, "student")):
            check_window(options.augmentation, network, role, card, device)
        self.precision = resolve_precision(options.precision, device, student)
        lay_out(student, options, device)
        self.channels_first = overruns(student, device)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        self.augmenter = Augmenter(options.augmentation, seed)
        self.average: AveragedModel | None = None
        if options.ema is not None:
            averaging = get_ema_multi_avg_fn(options.ema)
            self.average = AveragedModel(student, multi_avg_fn=averaging, use_buffers=True)
        if distributed.size() > 1:
            self.network = DistributedDataParallel(student)
        self._forward: _Forward = self._logits
        if options.compile:
            self._forward = torch.compile(with_cache_of_its_own(self._logits), dynamic=False)
        self._train_mode()

    def _train_mode(self) -> None:
        """Put the student in training mode, BatchNorm and dropout as the options have them."""
        # Some networks draw in functions of their own, by the mode of a module around them.
        self.student.train(self.options.dropout)
        for _, layer in stating(self.student):
            layer.train(not self.options.freeze_bn)

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        if options.optimizer == "adamw":
            return torch.optim.AdamW(
                self.parameters, lr=options.lr, weight_decay=options.weight_decay
            )
        return torch.optim.SGD(
            self.parameters,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
        )

    def step(self, *batches: Batch, share: float = 1.0) -> Tensor:
        """Take one optimizer step.

        Args:
            batches: from each set of images that the student is taught on; this rank's part.
            share: of the step's images, those of this rank, times the number of ranks.

        Returns:
            The loss on these images, of shape (), on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * self.options.lr_factor(self.done, self.total)
        self.augmenter.begin(self.done)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        # BatchNorm in training has no variance to learn from a single image of 1×1 features.
        least = min(len(labels) for _, labels in batches)
        parts = max(1, min(self.options.accumulate, least // 2))
        split = [
            list(zip(stored.tensor_split(parts), labels.tensor_split(parts), strict=True))
            for stored, labels in batches
        ]
        for part in zip(*split, strict=True):
            weight = len(part[0][1]) / len(batches[0][1])
            moved = [(stored.to(self.device), labels.to(self.device)) for stored, labels in part]
            with several_rows():
                partial = weight * self.loss(*moved)
            (share * partial).backward()
            loss += partial.detach()
        if self.options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.student)
        self.done += 1
        return loss

    @abstractmethod
    def loss(self, *batches: Batch) -> Tensor:
        """Return what a step lowers, of shape (), with a graph to the student's weights.

        Args:
            batches: one from each set of images, on the device.
        """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's logits (N, K) of normalised images, float32."""
        if self.channels_first:
            images = images.contiguous()
        elif self.precision == "bfloat16":
            images = images.contiguous(memory_format=torch.channels_last)
        if self._forward == self._logits:
            return self._logits(images)
        try:
            with quiet_compiler():
                return self._forward(images)
        except Exception as error:  # whatever a compiler raises, eager still works
            self.note(f"training runs without compilation: it failed ({reason_of(error)})")
            self._forward = self._logits
            return self._logits(images)

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.precision, self.device):
            with torch.no_grad():
                target = self.teacher(images)
            return self.network(images).float(), target.float()

    def agree(self) -> None:
        """Give every rank the first one's BatchNorm statistics; each has seen other images."""
        if distributed.size() == 1:
            return
        averaged = [] if self.average is None else [self.average.module]
        for model in [self.student, *averaged]:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    @property
    def current(self) -> nn.Module:
        """The network that the student would be if training ended now."""
        return self.student if self.average is None else self.average.module

    def finish(self, sets: Sequence[Images], progress: Progress = _unseen) -> None:
        """Leave the student as it is to be used, in eval mode.

        Args:
            sets: that it was taught on, for BatchNorm statistics where they are to be taken anew:
                as many images of each, as its steps had them.
            progress: begins what is to be shown of that, with the number of batches; the callable
                takes how many are done.

        Raises:
            DreamkitError: training diverged.
        """
        self.agree()
        if self.average is not None and self.done:
            self.student.load_state_dict(self.average.module.state_dict())
        self.student.eval()
        self.student.to(memory_format=torch.contiguous_format)  # as it will be when it is loaded
        if not self.finite:
            raise DreamkitError(
                f"the student's weights are not finite after {self.done} steps: lower lr, or set "
                "clip_norm",
                ("lr",),
            )
        if self.options.statistics != "keep" and self.done:
            self._take_statistics(sets, progress)

    def _take_statistics(self, sets: Sequence[Images], progress: Progress) -> None:
        most, size = self.options.statistics_batches, self.options.batch_size
        sample = drawn_evenly(sets, most * size, stream(self.seed, "statistics at the end"))
        batches = NormalisedBatches(sample, self.card, self.device, size * len(sets), most)
        how, student, teacher = self.options.statistics, self.student, self.teacher
        with progress(len(batches)) as advance:
            take_statistics(how, student, teacher, self.kept, batches, advance, self.note)

    @property
    def finite(self) -> bool:
        """Whether all weights are."""
        return all(bool(p.isfinite().all()) for p in self.parameters)

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, as a flat dictionary of tensors."""
        found = {"done": torch.tensor(self.done)}
        found |= prefixed("student", tensors_of(self.student))
        found |= prefixed("optimizer", optimizer_state(self.optimizer))
        if self.average is not None:
            found |= prefixed("average", tensors_of(self.average))
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.done = int(state["done"])
        load_state(self.student, below("student", state))
        restore_optimizer(self.optimizer, below("optimizer", state))
        if self.average is not None:
            self.average.load_state_dict(below("average", state))


@contextmanager
def several_rows() -> Iterator[None]:
    """Say what is to be done where BatchNorm in training is given a single value a channel.

    Raises:
        DreamkitError: it was.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DreamkitError(
            "a step has one image, of which BatchNorm cannot tell a variance here: train on two "
            "images or more; dreams that come one batch at a time need a synthesis batch_size of "
            "2 or more"
        ) from error


_Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
