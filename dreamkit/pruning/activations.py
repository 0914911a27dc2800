"""What the layers of a network are given and put out, no more of it computed than is asked for."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from dreamkit.model_state import hooked

HELD = 2**28
"""Numbers of the teacher's outputs that are kept for the layers to come (1 GB)."""


def weighted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all convolutions, of whatever dimensions, and linear layers, by name."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def called_once(model: nn.Module, images: Tensor) -> list[str]:
    """Return the convolutions and linear layers that a forward pass calls once, in its order."""
    calls: Counter[str] = Counter()
    layers = [(n, m) for n, m in weighted_layers(model) if isinstance(m, nn.Conv2d | nn.Linear)]
    with hooked(layers, lambda name, module, x: calls.update([name])):
        model(images[:2])
    return [name for name, count in calls.items() if count == 1]


class _Reached(Exception):
    """A forward pass came to the layer that was waited for; what follows is not needed."""


def given(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return what a layer is given, in float32, computing nothing from there on."""
    found: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        found.append(inputs[0] if inputs else next(iter(named.values())))
        raise _Reached

    layer = model.get_submodule(name)
    with (
        layer.register_forward_pre_hook(see, with_kwargs=True),
        contextlib.suppress(_Reached),
    ):
        model(images)
    return found[0].float()


def put_out(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Return what some layers put out, in float32, a tensor for each batch.

    Args:
        model: in eval mode.
        names: in forward order; as many of the first as ``HELD`` allows, one at the least.
        batches: what the model is given.
    """
    sizes: dict[str, int] = {}
    some = batches[0][:2]

    def measure(name: str, module: nn.Module, output: Tensor) -> None:
        sizes[name] = output.numel() // len(some)  # windows of an image may be a batch's

    with _watched(model, names, measure):
        model(some)
    images = sum(len(batch) for batch in batches)
    totals = itertools.accumulate(images * sizes[name] for name in names)
    number = max(1, sum(total <= HELD for total in totals))
    found: dict[str, list[Tensor]] = {name: [] for name in names[:number]}

    def keep(name: str, module: nn.Module, output: Tensor) -> None:
        found[name].append(output.float().clone())  # what follows may work in place
        if name == names[number - 1]:
            raise _Reached

    for batch in batches:
        with _watched(model, found, keep), contextlib.suppress(_Reached):
            model(batch)
    return found


@contextlib.contextmanager
def _watched(
    model: nn.Module, names: Iterable[str], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Show what layers put out, by their names."""
    with contextlib.ExitStack() as stack:
        for name in names:

            def hook(
                module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                see(name, module, output)

            stack.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield
