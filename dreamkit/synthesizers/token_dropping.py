"""Patches are left out as dreaming goes on: those that shape an image least, or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.errors import TeacherMismatch, placed
from dreamkit.model_state import eval_mode
from dreamkit.synthesizers.block_outputs import check_patches, feature_blocks, patch_grid
from dreamkit.synthesizers.engine import Evaluation
from dreamkit.synthesizers.views import gathered
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import Teacher
from dreamkit.wording import and_more

Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor | None], Evaluation]
"""From images, labels, how they are rolled and mirrored, and colours, as ``Evaluator``."""


@dataclass(frozen=True)
class TokenDropping:
    """Patches left out of a network that takes tokens: a step takes as much less time.

    By ``gradient`` it is sparse inversion: those that shape an image least go for good as dreaming
    goes on (Hu et al., "Sparse Model Inversion: Efficient Inversion of Vision Transformers for
    Data-Free Applications", ICML 2024). The paper drops by the attention that the class pays a
    patch; here it is by the square of the loss's gradient in its pixels, summed since patches were
    dropped last: fused kernels show no attention. What is dropped stays in the image and is no
    longer seen. By ``pixels`` momentum, jitter and terms of the pixels move it a little; by
    ``fourier`` it changes with the others, and whole images may lose their class.

    At ``random`` each step leaves out others, so that a class shows all over the image (as in
    training: Liu et al., "PatchDropout: Economizing Vision Transformers Using Patch Dropout", WACV
    2023).

    Args:
        share: of the patches that are left, how many are dropped each time: one at least, and two
            stay.
        after: steps of each stage after which they are, by ``gradient``; ``random`` does not look.
        by: what decides which patches go.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    after: tuple[Annotated[int, Field(ge=1)], ...] = (50, 100, 200, 300)
    by: Literal["gradient", "random"] = "gradient"

    def worth(self, steps: int) -> float:
        """Return how many steps with all patches those of a stage take as long as."""
        if self.by == "random":
            return steps * (1 - self.share)
        marks = sorted({0, steps, *(step for step in self.after if step < steps)})
        return sum(
            (end - start) * (1 - self.share) ** number
            for number, (start, end) in enumerate(pairwise(marks))
        )


@dataclass(frozen=True)
class TokenEntry:
    """Where a network has an image's patches as tokens (N, T, C), with their places told.

    Args:
        name: of the block that is given them first.
        extra: tokens before those of patches, which stay.
        patch: height and width of a patch in pixels.
    """

    name: str
    extra: int
    patch: tuple[int, int]


def token_entry(teacher: Teacher) -> TokenEntry:
    """Return where patches can be left out of a teacher.

    Raises:
        TeacherMismatch: it has no tokens, does not take fewer of them, or tells their places later.
    """
    model, name = teacher.model, teacher.card.name
    with placed("token_dropping"):
        check_patches(teacher, teacher.card.input_size[1:])
    blocks = feature_blocks(teacher)
    images = blank_noise(model, teacher.card.input_size)
    entry = _entry(model, blocks[0].name, images) if blocks else None
    if entry is None:
        raise _refused(name, "has no blocks that are given them as tokens, as a vision transformer")
    gate = TokenGate(entry, TokenDropping(0.5, (1,)))
    gate.seen(1, images.float())
    with torch.no_grad(), eval_mode(model):
        right = model(images)
        with _hooked(model, entry.name, partial(_reversed, entry.extra)):
            turned = model(images)
        rounding = 1e3 * torch.finfo(right.dtype).eps * float(right.abs().max())
        if not torch.allclose(turned, right, rtol=0, atol=rounding):
            raise _refused(name, "tells patches' places only after they are tokens")
        try:
            with _hooked(model, entry.name, gate.filtered), gate.shut(torch.zeros(3)):
                model(images)
        except Exception as error:  # anyone's code
            raise _refused(name, f"takes all of them alone ({type(error).__name__})") from error
    return entry


def _refused(name: str, why: str) -> TeacherMismatch:
    return TeacherMismatch(
        f"token_dropping leaves patches out, and {name} {why}; set it to null", ("token_dropping",)
    )


def _reversed(extra: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a block's inputs with the tokens of patches in reverse order."""
    tokens, *others = inputs
    return torch.cat([tokens[:, :extra], tokens[:, extra:].flip(1)], 1), *others


@contextmanager
def _hooked(model: nn.Module, name: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _entry(model: nn.Module, name: str, images: Tensor) -> TokenEntry | None:
    given: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.extend(x for x in inputs[:1] if isinstance(x, Tensor) and x.dim() == 3)

    with torch.no_grad(), eval_mode(model), _hooked(model, name, see):
        model(images)
    if not given or len(given[0]) != len(images):
        return None
    height, width = images.shape[2:]
    grid = patch_grid(given[0].shape[1], height, width)
    if grid is None:
        return None
    rows, columns, extra = grid
    return TokenEntry(name, extra, (height // rows, width // columns))


class TokenGate:
    """Lets those patches alone pass into a network that have not been dropped.

    Args:
        entry: where it stands.
        options: how many are dropped, and when.
    """

    def __init__(self, entry: TokenEntry, options: TokenDropping) -> None:
        self.entry = entry
        self.options = options
        self.left: Tensor | None = None
        """Which patches are, 1 or 0, (N, 1, rows, columns); None for all."""
        self.count = 0
        """How many of an image are, once some were dropped."""
        self.has_dropped = False
        """Whether the step before did."""
        self._wanted: Tensor | None = None
        self._view: Tensor | None = None

    def begin(self, evaluate: Evaluate, steps: int, generator: torch.Generator) -> Evaluate:
        """Begin a stage with all patches; return what evaluates its steps one after the other.

        The network is shown all of an image outside of these.

        Args:
            evaluate: a step.
            steps: of the stage; none is dropped after the last.
            generator: a CPU generator, of what goes at random.
        """
        self.left, self._wanted, self.has_dropped = None, None, False
        numbers = count(1)

        def some_patches(
            images: Tensor, labels: Tensor, draw: Tensor, colours: Tensor | None
        ) -> Evaluation:
            if self.options.by == "random":
                sides = [a // b for a, b in zip(images.shape[2:], self.entry.patch, strict=True)]
                chance = torch.rand(len(images), 1, *sides, generator=generator)
                self.count = chance[0].numel()
                self._keep_most(chance.to(images.device, non_blocking=True))
            with self.shut(draw):
                found = evaluate(images, labels, draw, colours)
            step = next(numbers)
            self.has_dropped = False
            if self.options.by == "gradient" and step < steps:
                self.seen(step, found.gradient)
            return found

        return some_patches

    @contextmanager
    def shut(self, draw: Tensor) -> Iterator[None]:
        """Let nothing pass that was dropped, while the block lasts.

        Args:
            draw: how images are rolled and mirrored, (3,), as ``View`` takes it.
        """
        high, wide = self.entry.patch
        self._view = torch.stack([draw[0] / high, draw[1] / wide, draw[2]]).round().long()
        try:
            yield
        finally:
            self._view = None

    def seen(self, step: int, gradient: Tensor) -> None:
        """Add up how much the loss wants to change each patch; drop some if it is time to.

        Args:
            step: that was taken, from 1.
            gradient: of the loss in the images, (N, C, H, W).
        """
        by_patch = F.avg_pool2d(gradient.square().sum(1, keepdim=True), self.entry.patch)
        total = by_patch if self._wanted is None else self._wanted + by_patch
        self._wanted, self.has_dropped = total, step in self.options.after
        if not self.has_dropped:
            return
        if self.left is None:
            self.left, self.count = torch.ones_like(total), total[0].numel()
        self._keep_most(total.masked_fill(self.left == 0, -1))
        self._wanted = None

    def _keep_most(self, worth: Tensor) -> None:
        """Drop those of an image's patches that are worth least, (N, 1, rows, columns)."""
        # One patch has no other to be compared with.
        gone = max(1, int(self.count * self.options.share))
        self.count = max(min(2, self.count), self.count - gone)
        ranked = worth.flatten(1).topk(self.count).indices
        self.left = torch.zeros_like(worth).flatten(1).scatter(1, ranked, 1.0).view_as(worth)

    def filtered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return a block's inputs without the tokens that were dropped; None for all, as hooks."""
        if self.left is None or self._view is None:
            return None
        tokens, *others = inputs
        shown = gathered(self.left, self._view).flatten(1)
        # Of as many as are known to be left: a GPU need not be waited for.
        places = shown.topk(self.count).indices.sort().values + self.entry.extra
        always = torch.arange(self.entry.extra, device=places.device).expand(len(shown), -1)
        places = torch.cat([always, places], 1).unsqueeze(2).expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, places), *others


@contextmanager
def gated(
    teacher: Teacher, options: TokenDropping | None, note: Callable[[str], None]
) -> Iterator[TokenGate | None]:
    """Have a gate stand in a teacher while the block lasts, if patches are to be dropped."""
    if options is None:
        yield None
        return
    gate = TokenGate(token_entry(teacher), options)
    if options.by == "random":
        note(
            f"token_dropping: each step leaves out {options.share:.0%} of the patches, at random, "
            f"before {gate.entry.name}. Steps are not compiled"
        )
    else:
        note(
            f"token_dropping: {options.share:.0%} of the patches that are left go after each of "
            f"the steps {and_more([str(step) for step in options.after])} of a stage, before "
            f"{gate.entry.name}. Steps are not compiled; unless the parameterisation is pixels, "
            "patches that are gone still change unseen"
        )
    with _hooked(teacher.model, gate.entry.name, gate.filtered):
        yield gate
