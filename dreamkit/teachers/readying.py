"""Making a network of anyone's one that can be worked on: plain modules with float32 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.model_state import device_of, eval_mode, to_eval
from dreamkit.wording import and_more, one_line

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_BATCH_NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def made_ready(
    model: nn.Module,
    input_size: tuple[int, int, int],
    note: Callable[[str], None] = lambda text: None,
    role: str = "the network",
) -> nn.Module:
    """Return a copy of a network, in eval mode, that can be traced, trained and saved.

    Compiled and parallel wrappers are taken off, of the whole and of its parts. Lazy modules get
    their shapes from a blank image. Weights of other precisions, and those that were made in
    ``torch.inference_mode``, become float32 that can learn. ``SyncBatchNorm``, also timm's with an
    activation, becomes BatchNorm, which alone learns on a CPU. The names of the state dict are the
    unwrapped network's.

    Args:
        model: left as it is, except that its lazy modules get their shapes.
        input_size: (channels, height, width).
        note: told what was done.
        role: what the network is called in messages.

    Raises:
        DreamkitError: it cannot be copied, or lazy modules do not run.
    """
    model = unwrapped(model)
    _run_lazy(model, input_size, role)  # before: what has no shape yet cannot be copied
    own = _copy(model, role)
    for parent in list(own.modules()):
        for name, child in list(parent._modules.items()):  # one child may have several names
            if child is not None and (inner := unwrapped(child)) is not child:
                setattr(parent, name, inner)
    _make_ordinary(own)
    kinds = {t.dtype for t in (*own.parameters(), *own.buffers()) if t.is_floating_point()}
    if kinds - {torch.float32}:
        names = and_more(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        note(f"{role}: its weights are {names}; it is computed in float32")
        own.float()
    _replace_synchronised(own, input_size)
    to_eval(own)
    return own


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what ``torch.compile``, data parallelism or weight averaging wrap."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, _WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _copy(model: nn.Module, role: str) -> nn.Module:
    try:
        own = copied(model)
    except Exception as error:  # anyone's module
        raise DreamkitError(
            f"{role}: {type(model).__name__} cannot be copied ({one_line(error)}): give a network "
            "whose attributes can be, without open files, locks or generators"
        ) from error
    for module in own.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None  # of module.compile(), which would hide hooks
    return own


def _run_lazy(model: nn.Module, input_size: tuple[int, int, int], role: str) -> None:
    """Let modules that take their shapes from what they are given first have them."""
    if not any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        return
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(2, *input_size, device=device_of(model)))
    except Exception as error:  # anyone's module
        raise DreamkitError(
            f"{role}: its lazy modules do not take an image of size {input_size}: {one_line(error)}"
        ) from error


def _make_ordinary(model: nn.Module) -> None:
    """Replace tensors of inference mode, which no gradient may pass, by equal ones."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_inference():
                fresh = made.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                module._parameters[name] = fresh
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_inference():
                module._buffers[name] = buffer.clone()


def _replace_synchronised(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if not found:
        return
    dimensions: dict[str, int] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: dimensions.setdefault(name, inputs[0].dim()) and None
        )
        for name, module in found
    ]
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(2, *input_size, device=device_of(model)))
    except Exception:  # intake tells what does not run
        dimensions.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in found:
        plain = _not_synchronised(layer, dimensions.get(name, 4))
        if plain is None:
            continue
        plain.load_state_dict(layer.state_dict())
        plain.to(device_of(model)).train(layer.training)
        for key, parameter in layer.named_parameters():
            plain.get_parameter(key).requires_grad_(parameter.requires_grad)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def _not_synchronised(layer: nn.SyncBatchNorm, dimensions: int) -> nn.Module | None:
    """Return a layer that does the same on one device; None if the layer's class does more."""
    sizes: Any = (
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
    )
    if type(layer) is nn.SyncBatchNorm:
        return _BATCH_NORMS.get(dimensions, nn.BatchNorm2d)(*sizes)
    if type(layer).__name__ != "SyncBatchNormAct":
        return None
    from timm.layers.norm_act import BatchNormAct2d  # imported where one of its networks is

    plain = BatchNormAct2d(*sizes)
    plain.act, plain.drop = layer.get_submodule("act"), layer.get_submodule("drop")
    return plain
