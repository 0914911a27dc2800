"""One training within a run: its batches, records and checkpoints, and dreams on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamkit import distributed
from dreamkit.errors import DreamkitError, StoreError
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import reseed
from dreamkit.out_of_memory import enough_memory
from dreamkit.seeds import derived_seed, stream
from dreamkit.stages.adaptive import AdaptivePool
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.training.batches import Draws
from dreamkit.training.reading import BatchReader
from dreamkit.training.trainer import Trainer
from dreamkit.types import Images, RunContext

CHECKPOINT_SECONDS = 60.0
"""Most training that an interruption loses."""
_CURVE_POINTS = 200


class TrainingRun:
    """One student's training: the trainer, the images dealt to it, and where both stand.

    Args:
        context: the run's.
        trainer: at its beginning.
        sets: of images, from each of which a step takes a batch; one of them may be adaptive.
        stage: what it is called in records and reports.
        checkpoint: where it is kept, None to keep nothing.
    """

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer[Any],
        sets: Sequence[Images | AdaptivePool],
        stage: str,
        checkpoint: Path | None,
    ) -> None:
        self.context = context
        self.trainer = trainer
        self.total = trainer.total
        self.stage = stage
        self.checkpoint = checkpoint
        self.adaptive: AdaptivePool | None = None
        self.grows = 0
        """Which of the sets grows, if one does."""
        self.pools: list[Images] = []
        draws: list[Draws] = []
        for number, images in enumerate(sets):
            if isinstance(images, AdaptivePool):
                images.check(self.total)
                self.adaptive, self.grows = images, number
                self.pools.append(images.pool)
            else:
                self.pools.append(images)
            generator = stream(context.seed, f"batches of set {number}")
            draws.append(Draws(trainer.options.batch_size, generator))
        self.reader = BatchReader(self.pools, draws, context.log.note)
        self._diverged = torch.zeros((), dtype=torch.int64, device=context.device)
        """The first step whose loss was not finite, 0 if none was."""
        self.seconds = 0.0
        self.saved = time.perf_counter()

    def run(self) -> None:
        """Take all steps, from where an interrupted try was.

        Raises:
            DreamkitError: the training diverged, or its batches do not fit in memory.
        """
        cure = (
            f"lower batch_size ({self.trainer.options.batch_size} now), or raise accumulate "
            f"({self.trainer.options.accumulate} now), which sends a step's images through in parts"
        )
        with enough_memory(self.stage, cure, ("batch_size",)):
            self._run()

    def _run(self) -> None:
        log, every = self.context.log, max(1, self.total // _CURVE_POINTS)
        if self.trainer.options.evaluate_every is not None and self.context.evaluation is None:
            log.note("evaluate_every has no effect: there are no evaluation images")
        if not self._restore():
            log.begin(self.stage)
            for draws, pool in zip(self.reader.draws, self.pools, strict=True):
                draws.add(len(pool))
        with (
            log.progress(self.stage, self.total, self.trainer.done) as advance,
            self.reader.at_work(),
        ):
            while (done := self.trainer.done) < self.total:
                if self.adaptive is not None and self.adaptive.due(done):
                    self._refuse_divergence()
                    with self._saved_if_stopped():
                        self._dream(self.adaptive)
                start = time.perf_counter()
                loss = self._step()
                done += 1
                recorded = done % every == 0 or done == self.total
                if recorded or loss.device.type == "cpu":  # elsewhere a look waits
                    self._refuse_divergence()
                if recorded:
                    log.record(self.stage, done, {"loss": float(loss)})
                self.seconds += time.perf_counter() - start
                self._look(done)
                if time.perf_counter() - self.saved > CHECKPOINT_SECONDS or done == self.total:
                    self._save()
                advance(done)
                with self._saved_if_stopped():
                    log.check(together=True)
        start = time.perf_counter()
        self.trainer.finish(self.pools, partial(log.progress, f"end of {self.stage}"))
        self.seconds += time.perf_counter() - start
        spent = {"training.seconds": self.seconds, "training.steps": self.trainer.done}
        metrics = self.context.log.metrics  # a run may train more than once
        metrics |= {name: metrics.get(name, 0) + number for name, number in spent.items()}

    @contextmanager
    def _saved_if_stopped(self) -> Iterator[None]:
        """Between two steps nothing is half done: keep it if the run is stopped there."""
        try:
            yield
        except KeyboardInterrupt:
            dealt = [draws.size for draws in self.reader.draws]
            if dealt == [len(pool) for pool in self.pools]:  # else it was stopped amid a merge
                self._save()
            raise

    def _dream(self, pool: AdaptivePool) -> None:
        """Dream against the student as it is.

        A run that is killed later and goes on from an earlier checkpoint comes by here again with
        the same student, and finds these dreams in the store.
        """
        self.trainer.agree()  # it is one student that all ranks dream against
        self.reader.draws[self.grows].add(pool.dream())
        self.context.log.record("pool", self.trainer.done, {"images": len(pool.pool)})

    def _step(self) -> Tensor:
        """Take one step, while the next one's images are read; return its loss, of shape ()."""
        batches, share, done = self.reader.next(), self.reader.share, self.trainer.done
        # What networks draw, as dropout does, follows from the step: an interrupted run draws it
        # again, and each rank draws its own.
        reseed(derived_seed(self.context.seed, f"step {done} on rank {distributed.rank()}"))
        follows = done + 1 < self.total
        grows = self.adaptive is not None and self.adaptive.due(done + 1)
        with self.reader.reading_ahead(follows and not grows):
            loss = self.trainer.step(*batches, share=share)
        first = (self._diverged == 0) & ~loss.isfinite()
        self._diverged = torch.where(first, done + 1, self._diverged)
        return loss

    def _refuse_divergence(self) -> None:
        """End a training whose loss is not finite any more.

        Raises:
            DreamkitError: it is not.
        """
        step, options = int(self._diverged), self.trainer.options
        if not distributed.anywhere(step > 0):
            return
        float32 = "" if self.trainer.precision == "float32" else ", or precision: float32"
        raise DreamkitError(
            f"the loss is not finite at step {step or self.trainer.done} of {self.total}, so the "
            f"training diverged: lower lr (it is {options.lr}), or set clip_norm{float32}. The "
            "images that it was taught on are kept",
            ("lr",),
        )

    def _look(self, done: int) -> None:
        """Measure the accuracy on evaluation images, where that is asked for."""
        images, every = self.context.evaluation, self.trainer.options.evaluate_every
        if images is None or every is None or (done % every and done != self.total):
            return
        self.trainer.agree()
        model, card = self.trainer.current, self.trainer.card
        with self.context.log.progress(f"{self.stage} accuracy", len(images)) as advance:
            found = accuracy(model, images, card, self.context.device, advance)
        self.context.log.record(f"{self.stage} accuracy", done, {"accuracy": found})

    def _save(self) -> None:
        if self.checkpoint is None or not self.trainer.finite:
            return
        state = prefixed("trainer", self.trainer.state())
        for number, dealt in enumerate(self.reader.state()):
            state |= prefixed(f"draws.{number}", dealt)
        facts = {"seconds": self.seconds, "of": self._of}
        facts["batches"] = 0 if self.adaptive is None else self.adaptive.batches
        write_checkpoint(self.checkpoint, state, facts)
        self.saved = time.perf_counter()

    @property
    def _of(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run beside the recipe."""
        images = [len(pool) for pool in self.pools]
        if self.adaptive is not None:
            images[self.grows] = self.adaptive.images
        return {
            "images": images,
            "steps": self.total,
            "teacher": self.trainer.card.weights_sha256,
        }

    def _restore(self) -> bool:
        """Go on from the last checkpoint; return whether there was one."""
        found = read_checkpoint(self.checkpoint) if self.checkpoint is not None else None
        if found is None:
            return False
        state, facts = found
        if facts["of"] != self._of:
            raise StoreError(
                f"{self.checkpoint} is of a training with {facts['of']}, and this one has "
                f"{self._of}; delete it to train from the start"
            )
        if self.adaptive is not None:
            self.adaptive.restore(facts["batches"])
        self.trainer.restore(below("trainer", state))
        sets = range(len(self.pools))
        self.reader.restore([below(f"draws.{number}", state) for number in sets])
        self.seconds = facts["seconds"]
        done = self.trainer.done
        self.context.log.note(f"{self.stage}: going on from step {done} of {self.total}")
        return True
