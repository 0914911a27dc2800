"""Letting a network return its logits, whatever it wraps them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dreamkit.wording import and_more

NAMES = ("logits", "out", "output", "scores")
"""Keys and attributes of an output that hold logits, the surest first."""
TWO_LOGITS = (
    "wrap it in a module whose forward returns two: x = net(images).reshape(-1, 1); "
    "return torch.cat([-x, x], 1) / 2"
)


@dataclass(frozen=True)
class TakeLogits:
    """A forward hook: of what a network returns, the logits (N, classes) in float32.

    Args:
        classes: how many logits an image has; a network that was given more since has those.
    """

    classes: int

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Return the logits; what holds none stays as it is."""
        if isinstance(output, Tensor) and output.dim() == 1:  # of one image, without its axis
            alone = bool(inputs) and isinstance(inputs[0], Tensor) and len(inputs[0]) == 1
            return output[None].float() if alone else output
        found = logits_in(output, self.classes)
        if found is None and not ambiguous(output):
            found = logits_in(output, None)
        return output if found is None else found[1]


def copy_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a network that works on its input in place a copy of it, a forward pre-hook."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def logits_in(output: Any, classes: int | None) -> tuple[str, Tensor] | None:
    """Return where the logits stand in what a network returned, and themselves in float32.

    Args:
        output: a tensor; or a tuple, a mapping or an object that holds some.
        classes: how many logits an image has; None for two or more.

    Returns:
        A name (empty for a plain tensor) and a tensor (N, classes); None if there are none.
    """
    return next(_all_logits_in(output, classes), None)


def ambiguous(output: Any) -> bool:
    """Whether an output holds several that may be logits, and no name tells which are."""
    found = list(_all_logits_in(output, None))
    sizes = {logits.shape[1] for _, logits in found}
    return len(sizes) > 1 and found[0][0] not in NAMES


def _all_logits_in(output: Any, classes: int | None) -> Iterator[tuple[str, Tensor]]:
    for name, value in _parts(output):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            fits = value.shape[1] == classes if classes else value.shape[1] > 1
            if fits and value[0].numel() == value.shape[1]:  # also (N, classes, 1, 1)
                yield name, value.flatten(1).float()


def _parts(output: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an output holds, with its name, logits first."""
    if isinstance(output, Tensor):
        yield "", output
        return
    named: dict[str, Any] = {}
    if isinstance(output, Mapping):
        named = {str(key): value for key, value in output.items()}
    elif hasattr(output, "_asdict"):  # a namedtuple
        named = dict(output._asdict())
    elif isinstance(output, tuple | list):
        named = {f"[{number}]": value for number, value in enumerate(output)}
    elif hasattr(output, "__dict__"):
        named = dict(vars(output))
    for name in NAMES:
        if name in named:
            yield name, named.pop(name)
    yield from named.items()


def why_no_logits(output: Any, classes: int | None, role: str) -> str:
    """Return what to say of an output for two images that holds no logits."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else None
    found = described(output)
    if isinstance(output, Tensor) and not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        return (
            f"{role} returns {kind} numbers, which no gradient passes, not logits: return what it "
            "takes the argmax of"
        )
    if shape in {(2,), (2, 1)}:
        return f"{role} returns one logit an image, {found} for 2 images; {TWO_LOGITS}"
    wanted = f"(2, {classes})" if classes else "(2, classes), two classes or more"
    text = f"{role} returns {found} for 2 images; it should be logits of shape {wanted}"
    if shape is not None and len(shape) == 2:
        return f"{text}: write num_classes: {shape[1]} if that is how many it knows"
    return f"{text}: let a function wrap it in a module whose forward returns them"


def described(output: Any) -> str:
    """Return what an output is and holds, e.g. ``dict (out: (2, 21, 8, 8))``."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    held = output
    if hasattr(output, "_asdict"):
        held = output._asdict()
    if isinstance(held, list | tuple):
        held = {f"[{number}]": value for number, value in enumerate(held)}
    elif not isinstance(held, dict):
        held = dict(getattr(output, "__dict__", {}))
    shapes = [
        f"{name}: {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in held.items()
    ]
    return type(output).__name__ + (f" ({and_more(shapes)})" if shapes else "")
