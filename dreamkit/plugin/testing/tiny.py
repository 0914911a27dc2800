"""What checks have in common: a tiny teacher, and how they say what is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.isolation import reason
from dreamkit.types import Teacher
from dreamkit.types.entries import check_entry

SIZE = (3, 8, 8)
CLASSES = 4


class ContractError(AssertionError):
    """An entry is not what dreamkit counts on; the message says in what."""


def expect(holds: bool, message: str) -> None:
    """Raise a ``ContractError`` with a message unless something holds."""
    if not holds:
        raise ContractError(message)


def made(kind: str, entry: Any) -> tuple[Any, str]:
    """Return an entry, built if it is a class, and what messages call it."""
    cls = entry if inspect.isclass(entry) else type(entry)
    try:
        check_entry(kind, cls)
        return (cls() if inspect.isclass(entry) else entry), cls.__name__
    except TypeError as error:
        raise ContractError(f"{cls.__name__} as one of the {kind}: {error}") from error


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Turn whatever an entry raises into a ``ContractError`` that says what it was to do."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{doing} raised {reason(error)}") from error


def check_scalar(value: Any, name: str) -> None:
    """Expect a finite scalar tensor."""
    expect(isinstance(value, Tensor), f"{name} returned {type(value).__name__}, not a Tensor")
    shape = tuple(value.shape)
    expect(shape == (), f"{name} returned shape {shape}; a loss has shape (): take its mean or sum")
    expect(value.is_floating_point(), f"{name} returned {value.dtype}; a loss is of floats")
    expect(bool(value.isfinite()), f"{name} returned {value.item()} of ordinary values")


def check_gradient(value: Tensor, source: Tensor, name: str, what: str) -> None:
    """Expect a finite gradient of a scalar in some tensor."""
    broken = f"no gradient of {name} reaches {what}: use no detach, item or argmax on the way"
    expect(value.requires_grad, broken)
    (gradient,) = torch.autograd.grad(value, [source], retain_graph=True, allow_unused=True)
    expect(gradient is not None, broken)
    expect(bool(gradient.isfinite().all()), f"the gradient of {name} in {what} is not finite")


class TinyNetwork(nn.Module):
    """Three convolutions with BatchNorm, the first of which may lose channels; 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 4)."""
        logits: Tensor = self.fc(self.body(self.stem(images)).mean(dim=(2, 3)))
        return logits


def tiny_teacher(seed: int = 0) -> Teacher:
    """Return a network of 3×8×8 images and 4 classes with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNetwork()
        model.train()
        with torch.no_grad():
            for _ in range(8):  # running statistics other than 0 and 1
                model(torch.randn(16, *SIZE))
    card = Card("tiny", SIZE, (0.5,) * 3, (0.25,) * 3, CLASSES, "dreamkit.plugin.testing")
    return Teacher(model.eval(), card, {"source": "tiny"})


@contextmanager
def untouched(model: nn.Module, name: str) -> Iterator[None]:
    """Expect a model to be after the block as it was before: weights, mode, gradients, hooks."""
    before = _snapshot(model)
    yield
    for what, value in _snapshot(model).items():
        expect(_same(before[what], value), f"{name} leaves other {what} in the model than it found")


def _snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes (train or eval)": [module.training for module in model.modules()],
        "gradients": [p.grad is None for p in model.parameters()],
        "requires_grad flags": [p.requires_grad for p in model.parameters()],
        "hooks": [[len(vars(module)[hook]) for hook in hooks] for module in model.modules()],
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return bool(one == other)
