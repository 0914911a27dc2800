"""The engine: it alone decides on dtype, memory format, compilation and graphs of an inversion.

The mathematics of a step comes to it as an *objective*, a function of images and labels that
returns the weighted terms of the loss; the engine returns those terms and their gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dreamkit.arithmetic import Precision, autocast, full_float32, resolve_precision
from dreamkit.colour_shift import recoloured
from dreamkit.compilation import quiet_compiler, reason_of, with_cache_of_its_own
from dreamkit.model_state import device_of, frozen
from dreamkit.synthesizers.padding import padding_joined
from dreamkit.synthesizers.strided_depthwise import StridedDepthwise
from dreamkit.synthesizers.views import View
from dreamkit.teachers.trying import blank_noise

Terms = dict[str, Tensor]


class Objective(Protocol):
    """From normalised images (N, C, H, W) and labels (N,) to the weighted terms, of shape ()."""

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        arithmetic: AbstractContextManager[Any],
        shown: Tensor | None = None,
    ) -> Terms:
        """Return the terms.

        Networks run inside ``arithmetic``, which sets their precision, and are given ``shown`` in
        the images' place, where it is there.
        """


LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""How far a compiled loss may be from the eager one, relative."""
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2}
"""How far a compiled gradient may be from the eager one, relative in the l2 norm."""
COMPILE_SECONDS = 15.0
COMPILE_SECONDS_PER_LAYER = 1.4
COMPILING_CORES = 2
"""How many cores these seconds are of; on one alone it takes as many times as long."""
EXPECTED_SPEEDUP = {"cpu": 1.3, "cuda": 2.0}
"""Of a compiled step over an eager one, by kind of device, for planning.

See ``benchmarks/README.md``; on a GPU the least of what was seen.
"""


@dataclass(frozen=True)
class Engine:
    """How an inversion is computed; what is computed does not change.

    Args:
        precision: of the network's arithmetic; statistics, regularizers and the loss are always
            float32, and float32 is no TF32. ``auto`` is bfloat16 where the hardware multiplies it
            natively.
        compile: ``auto`` compiles if the run is long enough to pay for it.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"

    def evaluator(
        self,
        objective: Objective,
        device: torch.device,
        note: Callable[[str], None] = lambda text: None,
    ) -> Evaluator:
        """Return what evaluates an objective on a device, eager as yet."""
        return Evaluator(objective, device, resolve_precision(self.precision, device), note)


@contextmanager
def borrowed(model: nn.Module, input_size: tuple[int, int, int]) -> Iterator[None]:
    """Freeze a model and show it images with channels last, if it takes them so; it is undone.

    So is that convolutions pad for themselves (``padding_joined``).

    Frozen weights need no gradients, which is a third of a backward pass. What images are laid out
    like, so are all features: convolutions are faster then, depthwise ones and channels' statistics
    several times. A model that views features as vectors takes them in the usual order alone, and
    on MPS passes back through such features fail in many versions of torch.

    Args:
        model: takes images and returns logits.
        input_size: (channels, height, width) of images that it takes.
    """
    with frozen(model), ExitStack() as stack:
        known_to_work = device_of(model).type in {"cpu", "cuda"}
        if known_to_work and not isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
            hook = model.register_forward_pre_hook(_channels_last)
            stack.callback(hook.remove)
            if not _runs(model, input_size):
                hook.remove()
        stack.enter_context(padding_joined(model, input_size))
        yield


def _channels_last(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = inputs
    # Copied, even those of one channel: they have either layout, and features that of the strides.
    laid_out = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
    return (laid_out, *others)


def _runs(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    try:
        with torch.no_grad():
            model(blank_noise(model, input_size))
    except Exception:  # anyone's code
        return False
    return True


@dataclass(frozen=True)
class Evaluation:
    """One step's weighted terms, their sum, and the sum's gradient in the images (N, C, H, W)."""

    terms: Terms
    loss: Tensor
    gradient: Tensor


class Evaluator:
    """Evaluates an objective and its gradient, compiled for the shapes where that held good.

    Args:
        objective: the mathematics.
        device: where tensors are.
        precision: of the networks' arithmetic.
        note: told if what was compiled fails later.
    """

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        precision: Precision,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.note = note
        self.objective = objective
        self.device = device
        self.precision = precision
        self.dtype: torch.dtype = getattr(torch, precision)
        self._compiled: dict[tuple[object, ...], _Loss] = {}
        self._strided = StridedDepthwise()
        self._strided.wanted = device.type == "cpu" and self.dtype == torch.bfloat16

    def __call__(
        self, images: Tensor, labels: Tensor, draw: Tensor, colours: Tensor | None = None
    ) -> Evaluation:
        """Return the terms at images as rolled and mirrored by ``draw``, and the gradient.

        Networks see them in ``colours``, as ``draw_colours`` returns a step's.
        """
        function = self._compiled.get(_key(images, colours))
        if function is None:
            return self._evaluate(self._loss, images, labels, draw, colours)
        try:
            return self._evaluate(function, images, labels, draw, colours)
        except Exception as error:  # it may be compiled anew, when a term is added, and fail
            self.discard_compiled()
            self.note(f"inversion goes on without compilation: {reason_of(error)}")
            return self._evaluate(self._loss, images, labels, draw, colours)

    @property
    def exact(self) -> bool:
        """Whether it is as faithful as can be: float32, and nothing compiled."""
        return self.dtype == torch.float32 and not self._compiled

    @property
    def best_eager(self) -> bool:
        """Whether compiled steps would be slower; known after a step.

        The compiler takes the slow backward pass of strided depthwise convolutions.
        """
        return self._strided.wanted

    def _loss(
        self, images: Tensor, labels: Tensor, draw: Tensor, colours: Tensor | None
    ) -> tuple[Tensor, Terms]:
        # Weights are constants here: the cache of their casts would only hold memory.
        arithmetic = autocast(self.precision, self.device, cache=False)
        viewed = View.apply(images, draw)
        shown = None if colours is None else recoloured(viewed, colours)
        terms = self.objective(viewed, labels, arithmetic, shown)
        return torch.stack(list(terms.values())).sum(), terms

    def _evaluate(
        self,
        function: _Loss,
        images: Tensor,
        labels: Tensor,
        draw: Tensor,
        colours: Tensor | None,
    ) -> Evaluation:
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        leaf = images.detach().contiguous().requires_grad_()
        with full_float32(self.precision, self.device):
            loss, terms = function(leaf, labels, draw, colours)
            with self._strided() if function == self._loss else nullcontext():
                (gradient,) = torch.autograd.grad(loss, [leaf])
        return Evaluation({k: v.detach() for k, v in terms.items()}, loss.detach(), gradient)

    def compile(self, images: Tensor, labels: Tensor, colours: Tensor | None = None) -> str | None:
        """Compile for the shape of ``images``, unless it is, and compare with eager there.

        Args are such as will be evaluated.

        Returns:
            Why it is left eager; None if it is compiled.
        """
        if _key(images, colours) in self._compiled:
            return None
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # CUDA graphs
        # The first call compiles, the second records a CUDA graph, the third replays it: on another
        # view, so that what was frozen into it would show.
        views = torch.tensor([[0, 0, 0], [1, 0, 0], [-1, 1, 1]], device=self.device)
        try:
            with quiet_compiler():
                function = torch.compile(
                    with_cache_of_its_own(self._loss), dynamic=False, fullgraph=True, mode=mode
                )
                for view in views:
                    found = self._evaluate(function, images, labels, view, colours)
        except Exception as error:  # whatever a compiler raises, eager still works
            return f"it could not be compiled ({reason_of(error)})"
        expected = self._evaluate(self._loss, images, labels, views[-1], colours)
        off = _distance(found, expected)
        allowed = LOSS_TOLERANCE[self.dtype], GRADIENT_TOLERANCE[self.dtype]
        if not _within(off, allowed) and self.dtype != torch.float32:
            # Through many layers rounding alone may put two bfloat16 results this far apart: the
            # compiled one holds good if it is about as near to float32 as the eager one.
            float32 = Evaluator(self.objective, self.device, "float32")
            exact = float32(images, labels, views[-1], colours)
            loss_off, gradient_off = _distance(expected, exact)
            allowed = max(allowed[0], 1.5 * loss_off), max(allowed[1], 1.5 * gradient_off)
            off = _distance(found, exact)
        if not _within(off, allowed):
            return f"compiled, its loss is {off[0]:.1e} and its gradient {off[1]:.1e} off"
        self._compiled[_key(images, colours)] = function
        return None

    def discard_compiled(self) -> None:
        """Go back to eager for every shape, and free what the compiled graphs hold."""
        if self._compiled:
            self._compiled.clear()
            gc.collect()  # a compiled function and what it closes over hold each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


_Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Terms]]


def _key(images: Tensor, colours: Tensor | None) -> tuple[object, ...]:
    """Return what a function is compiled for."""
    return *images.shape, colours is not None


def _distance(found: Evaluation, expected: Evaluation) -> tuple[float, float]:
    """Return how far a loss and its gradient (in the l2 norm) are from others, relative."""
    loss = float(expected.loss)
    difference = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    return abs(float(found.loss) - loss) / max(abs(loss), 1e-12), float(difference)


def _within(off: tuple[float, float], allowed: tuple[float, float]) -> bool:
    """Return whether both distances are allowed; one that is not a number is not."""
    return off[0] <= allowed[0] and off[1] <= allowed[1]


def compile_seconds(model: nn.Module) -> float:
    """Estimate how long compiling an inversion takes: see ``benchmarks/README.md``.

    Torch's threads tell how many cores a process has for itself.
    """
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    cores = min(torch.get_num_threads(), COMPILING_CORES)
    return (COMPILE_SECONDS + COMPILE_SECONDS_PER_LAYER * layers) * COMPILING_CORES / cores
