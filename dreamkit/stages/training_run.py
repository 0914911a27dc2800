"""One training within a run: its batches, records and checkpoints, and dreams on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dreamkit import distributed
from dreamkit.errors import DreamkitError, StoreError
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.flat_state import below, prefixed
from dreamkit.joined_images import JoinedImages
from dreamkit.out_of_memory import enough_memory
from dreamkit.stages.adaptive import AdaptivePool
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.training.batches import Draws
from dreamkit.training.trainer import Batch, Trainer
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
        self.draws: list[Draws] = []
        for number, images in enumerate(sets):
            if isinstance(images, AdaptivePool):
                images.check(self.total)
                self.adaptive, self.grows = images, number
                self.pools.append(images.pool)
            else:
                self.pools.append(images)
            seed = context.seed + 2 * number  # the trainer's own is between
            generator = torch.Generator().manual_seed(seed)
            self.draws.append(Draws(trainer.options.batch_size, generator))
        self._share = 1.0
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
            for draws, pool in zip(self.draws, self.pools, strict=True):
                draws.add(len(pool))
        with log.progress(self.stage, self.total) as advance:
            while (done := self.trainer.done) < self.total:
                if self.adaptive is not None and self.adaptive.due(done):
                    with self._saved_if_stopped():
                        self._dream(self.adaptive)
                start = time.perf_counter()
                loss = self.trainer.step(*self._batches(), share=self._share)
                done += 1
                if done % every == 0 or done == self.total:
                    log.record(self.stage, done, {"loss": float(loss)})
                self.seconds += time.perf_counter() - start
                self._look(done)
                if time.perf_counter() - self.saved > CHECKPOINT_SECONDS or done == self.total:
                    self._save()
                advance(done)
                with self._saved_if_stopped():
                    log.check(together=True)
        start = time.perf_counter()
        with log.progress(f"end of {self.stage}", 1):
            self.trainer.finish(self.pools[0] if len(self.pools) == 1 else JoinedImages(self.pools))
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
            dealt = [draws.size for draws in self.draws]
            if dealt == [len(pool) for pool in self.pools]:  # else it was stopped amid a merge
                self._save()
            raise

    def _dream(self, pool: AdaptivePool) -> None:
        """Dream against the student as it is.

        A run that is killed later and goes on from an earlier checkpoint comes by here again with
        the same student, and finds these dreams in the store.
        """
        self.trainer.agree()  # it is one student that all ranks dream against
        self.draws[self.grows].add(pool.dream())
        self.context.log.record("pool", self.trainer.done, {"images": len(pool.pool)})

    def _batches(self) -> list[Batch]:
        """Return this rank's part of the next batch of every set."""
        rank, ranks = distributed.rank(), distributed.size()
        found = []
        for number, (pool, draws) in enumerate(zip(self.pools, self.draws, strict=True)):
            drawn = draws.next()
            mine = drawn[rank::ranks]
            if len(drawn) < 2 * ranks and ranks > 1:
                raise DreamkitError(
                    f"{len(drawn)} images in a batch leave {ranks} ranks less than two each: give "
                    "it more, or use fewer ranks",
                    ("batch_size",),
                )
            if number == 0:
                self._share = len(mine) * ranks / len(drawn)
            found.append(pool.batch(mine))
        return found

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
        for number, draws in enumerate(self.draws):
            state |= prefixed(f"draws.{number}", draws.state())
        state["random"] = torch.get_rng_state()
        if self.context.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.context.device)
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
        for number, draws in enumerate(self.draws):
            draws.restore(below(f"draws.{number}", state))
        torch.set_rng_state(state["random"])
        if self.context.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.context.device)
        self.seconds = facts["seconds"]
        done = self.trainer.done
        self.context.log.note(f"{self.stage}: going on from step {done} of {self.total}")
        return True
