"""Teaching a student within a run: training with its progress, record and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamkit import distributed
from dreamkit.errors import DreamkitError, StoreError, placed
from dreamkit.evaluation.accuracy import accuracy
from dreamkit.flat_state import below, prefixed
from dreamkit.joined_images import JoinedImages
from dreamkit.model_state import frozen, seeded
from dreamkit.stages.adaptive import Adaptive, Growth, growing
from dreamkit.stages.dreaming import images_for, report_synthesis
from dreamkit.store.checkpoint import read_checkpoint, write_checkpoint
from dreamkit.synthesizers.engine import borrowed
from dreamkit.training.batches import Draws
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.training.trainer import Batch, Trainer, lay_out
from dreamkit.types import Images, ImageSource, RunContext

CHECKPOINT_SECONDS = 60.0
"""Most training that an interruption loses."""
_CURVE_POINTS = 200


def train_student(
    context: RunContext,
    student: nn.Module,
    images: Images | Growth,
    options: Distillation,
    stage: str,
    resumable: bool = True,
) -> Images:
    """Distil the run's teacher into ``student``, reporting under ``stage``.

    Args:
        context: the run's.
        student: on the run's device; trained in place and left in eval mode.
        images: fixed, or growing while the student is taught.
        options: how.
        stage: what it is called in records and reports.
        resumable: as of ``teach``.

    Returns:
        The images that it was taught on.
    """
    growing_images = images.images if isinstance(images, Growth) else len(images)
    trainer = Distiller(
        student,
        context.teacher.model,
        context.teacher.card,
        options,
        context.device,
        torch.Generator().manual_seed(context.seed + 1),
        options.total_steps(growing_images),
        context.log.note,
    )
    return teach(context, trainer, [images], stage, resumable)[0]


def teach(
    context: RunContext,
    trainer: Trainer[Any],
    sets: Sequence[Images | Growth],
    stage: str,
    resumable: bool = True,
) -> list[Images]:
    """Let a trainer take all of its steps, reporting under ``stage``.

    Adds to ``training.seconds`` and ``training.steps``.

    Args:
        context: the run's.
        trainer: at its beginning.
        sets: of images, from each of which a step takes a batch; one of them may grow.
        stage: what it is called in records and reports.
        resumable: keep checkpoints, and go on from one. The student must then be the same in
            every try of the run.

    Returns:
        The sets, each as it was in the end.
    """
    path = context.folder / RunContext.CHECKPOINTS / f"{stage}.safetensors"
    # Where networks compute in bfloat16 both read their weights with channels last.
    hold = borrowed if trainer.precision == "bfloat16" else frozen
    with hold(trainer.teacher), seeded(context.seed):
        teaching = _Teaching(context, trainer, sets, stage, path if resumable else None)
        teaching.run()
    return teaching.pools


def first_images(
    context: RunContext,
    source: ImageSource | None,
    adaptive: Adaptive | None,
    student: nn.Module,
    options: Distillation,
    place: str,
) -> Images:
    """Return the images that an application begins with, before its student is trained.

    Args:
        context: the run's.
        source: of images; the run's own dreams if None.
        adaptive: the rhythm of dreams that are made against the student; None dreams all first.
        student: what the first of them are made against.
        options: of the training, which is refused if it is too short for all dreams.
        place: where the options stand in the application, for messages.
    """
    if adaptive is None:
        return images_for(context, source)
    with growing(context, student, adaptive) as growth:
        growth.check(options.total_steps(growth.images), place)
        growth.dream()
    return growth.pool


def go_on_with(
    context: RunContext,
    student: nn.Module,
    images: Images,
    adaptive: Adaptive | None,
    options: Distillation,
    place: str,
) -> Images:
    """Distil the run's teacher into ``student`` on ``first_images`` and those to come.

    Args:
        context: the run's.
        student: as ``train_student`` takes it.
        images: from ``first_images``.
        adaptive: as it was given to that.
        options: how the student is trained.
        place: where the options stand in the application, for messages.

    Returns:
        The images that it was taught on.
    """
    stage = "recovery"
    if adaptive is None:
        with placed(place, always=False):
            return train_student(context, student, images, options, stage)
    lay_out(student, options, context.device)  # before it is compiled as a competitor
    with growing(context, student, adaptive) as growth:
        growth.restore(min(adaptive.batches, len(growth.dreams.plans)))
        with placed(place, always=False):
            pool = train_student(context, student, growth, options, stage)
        report_synthesis(context, growth.dreams.store)
    return pool


class _Teaching:
    """One student's training: the trainer, the images dealt to it, and where both stand."""

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer[Any],
        sets: Sequence[Images | Growth],
        stage: str,
        checkpoint: Path | None,
    ) -> None:
        self.context = context
        self.trainer = trainer
        self.total = trainer.total
        self.stage = stage
        self.checkpoint = checkpoint
        self.growth: Growth | None = None
        self.growing = 0
        """Which of the sets grows, if one does."""
        self.pools: list[Images] = []
        self.draws: list[Draws] = []
        for number, images in enumerate(sets):
            if isinstance(images, Growth):
                images.check(self.total)
                self.growth, self.growing = images, number
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
        log, every = self.context.log, max(1, self.total // _CURVE_POINTS)
        if self.trainer.options.evaluate_every is not None and self.context.evaluation is None:
            log.note("evaluate_every has no effect: there are no evaluation images")
        if not self._restore():
            log.begin(self.stage)
            for draws, pool in zip(self.draws, self.pools, strict=True):
                draws.add(len(pool))
        with log.progress(self.stage, self.total) as advance:
            while (done := self.trainer.done) < self.total:
                if self.growth is not None and self.growth.due(done):
                    with self._saved_if_stopped():
                        self._grow(self.growth)
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
        self.trainer.finish(self.pools[0] if len(self.pools) == 1 else JoinedImages(self.pools))
        self.seconds += time.perf_counter() - start
        spent = {"training.seconds": self.seconds, "training.steps": self.trainer.done}
        metrics = self.context.metrics  # a run may train more than once
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

    def _grow(self, growth: Growth) -> None:
        """Dream against the student as it is.

        A run that is killed later and goes on from an earlier checkpoint comes by here again with
        the same student, and finds these dreams in the store.
        """
        self.trainer.agree()  # it is one student that all ranks dream against
        self.draws[self.growing].add(growth.dream())
        self.context.log.record("pool", self.trainer.done, {"images": len(growth.pool)})

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
        model, card = self.trainer.current, self.context.teacher.card
        found = accuracy(model, images, card, self.context.device)
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
        facts["batches"] = 0 if self.growth is None else self.growth.batches
        write_checkpoint(self.checkpoint, state, facts)
        self.saved = time.perf_counter()

    @property
    def _of(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run beside the recipe."""
        images = [len(pool) for pool in self.pools]
        if self.growth is not None:
            images[self.growing] = self.growth.images
        return {
            "images": images,
            "steps": self.total,
            "teacher": self.context.teacher.card.weights_sha256,
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
        if self.growth is not None:
            self.growth.restore(facts["batches"])
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
