"""Borrowing a caller's model and giving it back as it was."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def to_eval(model: nn.Module) -> None:
    """Put a model in eval mode, whatever its own ``train()`` does or returns.

    A layer that goes on taking batch statistics would change them with every image it is shown.
    """
    model.eval()
    for module in model.modules():
        if module.training and isinstance(getattr(module, "running_mean", None), Tensor):
            module.eval()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; every submodule's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    to_eval(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and keep gradients from its weights; both are restored."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter, required in gradients:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def hooked(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Show ``see`` the name, the module and its first input before each forward of some modules."""

    def before(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        see(name, module, inputs[0] if inputs else next(iter(named.values())))

    with contextlib.ExitStack() as stack:  # a module that takes no hook leaves none in the others
        for name, module in modules:
            handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict, without what modules add to it that is no tensor."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def hide_extra_state(model: nn.Module) -> None:
    """Let a model's state dict hold tensors alone, as the tracer of TorchScript wants it."""

    if isinstance(model, torch.jit.ScriptModule):
        return  # it has none, and takes no hooks

    def hide(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name, value in state.items() if not isinstance(value, Tensor)]:
            del state[name]

    model.register_state_dict_post_hook(hide)


def load_state(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load tensors into a model of today's code.

    Some models ask for the version of their weights, which a plain dictionary does not hold. Extra
    state that is no tensor stays the model's own.
    """
    found: OrderedDict[str, Any] = OrderedDict(state)
    own: Any = model.state_dict()
    found.update({k: v for k, v in own.items() if not isinstance(v, Tensor) and k not in found})
    found._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
    model.load_state_dict(found, strict=strict)


class InputTap:
    """Keeps what some modules of a model were given in its last forward pass, by name."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Note one module's input."""
        self.inputs[name] = x


@contextlib.contextmanager
def inputs_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[InputTap]:
    """Hook some modules for as long as the block lasts, to see what they are given."""
    tap = InputTap()
    with hooked(modules, tap.see):
        yield tap


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from torch's global generators by ``seed``, and leave them as they were.

    Args:
        seed: of the CPU's generator, and of CUDA's where CUDA is in use.
        device: where it is drawn; a CUDA device brings CUDA in use, nothing else does.
    """
    on_cuda = device is not None and device.type == "cuda"
    in_use = on_cuda or torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if in_use else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, in_use)
        yield


def reseed(seed: int, with_cuda: bool | None = None) -> None:
    """Draw from torch's global generators by ``seed`` from here on.

    Args:
        seed: of the CPU's generator, and of CUDA's.
        with_cuda: whether of CUDA's; None where CUDA is in use.
    """
    in_use = torch.cuda.is_initialized() if with_cuda is None else with_cuda
    if in_use or not torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # the other would wait for CUDA, and seed it whenever the caller begins to use it
        torch.default_generator.manual_seed(seed)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
