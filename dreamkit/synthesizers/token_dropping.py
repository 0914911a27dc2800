"""Sparse inversion: patches that shape an image least are left out as dreaming goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import eval_mode
from dreamkit.synthesizers.block_outputs import feature_blocks, patch_grid
from dreamkit.synthesizers.engine import Evaluation
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import Teacher

Evaluate = Callable[[Tensor, Tensor, Tensor], Evaluation]
"""From images, labels and how they are rolled and mirrored, as ``Evaluator``."""


@dataclass(frozen=True)
class TokenDropping:
    """Sparse inversion: patches that shape an image least are left out as dreaming goes on.

    Hu et al., "Sparse Model Inversion: Efficient Inversion of Vision Transformers for Data-Free
    Applications", ICML 2024. A step takes as much less time as there are fewer tokens. The paper
    drops by the attention that the class pays a patch; here it is by the square of the loss's
    gradient in its pixels, summed since patches were dropped last: fused kernels show no attention.
    A dropped patch stays in the image as it was, if pixels are what the optimizer moves; by
    ``fourier`` it changes with the others, unseen, and whole images lose their class.

    Args:
        share: of the patches that are left, how many are dropped each time.
        after: steps of each stage after which they are.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    after: tuple[Annotated[int, Field(ge=1)], ...] = (50, 100, 200, 300)

    def worth(self, steps: int) -> float:
        """Return how many steps with all patches those of a stage take as long as."""
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
        TeacherMismatch: it has no tokens, or does not take fewer of them.
    """
    model, size = teacher.model, teacher.card.input_size
    blocks = feature_blocks(teacher)
    images = blank_noise(model, size)
    entry = _entry(model, blocks[0].name, images) if blocks else None
    if entry is None:
        raise TeacherMismatch(
            f"token_dropping leaves patches out, and {teacher.card.name} has no blocks that are "
            "given them as tokens (a vision transformer has); set it to null",
            ("token_dropping",),
        )
    gate = TokenGate(entry, TokenDropping(0.5, (1,)))
    gate.seen(1, images.float())
    try:
        with torch.no_grad(), eval_mode(model), standing(model, gate), gate.shut(torch.zeros(3)):
            model(images)
    except Exception as error:  # anyone's code
        raise TeacherMismatch(
            f"token_dropping leaves patches out, and {teacher.card.name} takes all of them alone "
            f"({type(error).__name__}); set it to null",
            ("token_dropping",),
        ) from error
    return entry


def check_tokens(options: TokenDropping | None, teacher: Teacher) -> None:
    """Refuse a teacher that patches are to be left out of, and that takes all of them alone."""
    if options is not None:
        token_entry(teacher)


def _entry(model: nn.Module, name: str, images: Tensor) -> TokenEntry | None:
    given: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.extend(x for x in inputs[:1] if isinstance(x, Tensor) and x.dim() == 3)

    hook = model.get_submodule(name).register_forward_pre_hook(see)
    try:
        with torch.no_grad(), eval_mode(model):
            model(images)
    finally:
        hook.remove()
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
        """Which patches are, (N, rows, columns); None for all."""
        self._wanted: Tensor | None = None
        self._view: tuple[int, int, bool] | None = None

    def begin(self, evaluate: Evaluate) -> Evaluate:
        """Begin a stage with all patches; return what evaluates its steps one after the other.

        The network is shown all of an image outside of these.
        """
        self.left = self._wanted = None
        steps = count(1)

        def some_patches(images: Tensor, labels: Tensor, draw: Tensor) -> Evaluation:
            with self.shut(draw):
                found = evaluate(images, labels, draw)
            self.seen(next(steps), found.gradient)
            return found

        return some_patches

    @contextmanager
    def shut(self, draw: Tensor) -> Iterator[None]:
        """Let nothing pass that was dropped, while the block lasts.

        Args:
            draw: how images are rolled and mirrored, (3,), as ``View`` takes it.
        """
        down, right, mirrored = draw.tolist()
        high, wide = self.entry.patch
        self._view = round(down / high), round(right / wide), bool(mirrored)
        try:
            yield
        finally:
            self._view = None

    def seen(self, step: int, gradient: Tensor) -> None:
        """Add up how much the loss wants to change each patch; drop some if it is time to.

        One at least is left.

        Args:
            step: that was taken, from 1.
            gradient: of the loss in the images, (N, C, H, W).
        """
        wanted = gradient.square().sum(1, keepdim=True)
        by_patch = F.avg_pool2d(wanted, self.entry.patch).squeeze(1)
        total = by_patch if self._wanted is None else self._wanted + by_patch
        self._wanted = total
        if step not in self.options.after:
            return
        before = torch.ones_like(total, dtype=torch.bool) if self.left is None else self.left
        patches = int(before[0].sum())
        stay = max(1, patches - math.floor(patches * self.options.share))
        ranked = total.masked_fill(~before, -1).flatten(1).topk(stay).indices
        left = torch.zeros_like(before).flatten(1).scatter(1, ranked, True)
        self.left, self._wanted = left.view_as(before), None

    def filtered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return a block's inputs without the tokens that were dropped; None for all, as hooks."""
        if self.left is None or self._view is None:
            return None
        tokens, *others = inputs
        down, right, mirrored = self._view
        shown = self.left.roll((down, right), (1, 2))
        shown = (shown.flip(2) if mirrored else shown).flatten(1)
        places = shown.nonzero()[:, 1].view(len(shown), -1) + self.entry.extra
        always = torch.arange(self.entry.extra, device=places.device).expand(len(shown), -1)
        places = torch.cat([always, places], 1).unsqueeze(2).expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, places), *others


@contextmanager
def standing(model: nn.Module, gate: TokenGate) -> Iterator[TokenGate]:
    """Have a gate stand in a model while the block lasts."""
    hook = model.get_submodule(gate.entry.name).register_forward_pre_hook(gate.filtered)
    try:
        yield gate
    finally:
        hook.remove()


@contextmanager
def gated(
    teacher: Teacher, options: TokenDropping | None, note: Callable[[str], None]
) -> Iterator[TokenGate | None]:
    """Have a gate stand in a teacher while the block lasts, if patches are to be dropped."""
    if options is None:
        yield None
        return
    with standing(teacher.model, TokenGate(token_entry(teacher), options)) as gate:
        left = (1 - options.share) ** len(options.after)
        note(
            f"token_dropping: {left:.0%} of the patches are left in the end, before "
            f"{gate.entry.name}; steps are not compiled, and by another parameterisation than "
            "pixels the rest of an image changes unseen"
        )
        yield gate
