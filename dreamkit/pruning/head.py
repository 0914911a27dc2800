"""The layer that makes a model's outputs, and giving it more of them.

DeepInversion (Yin et al., CVPR 2020), section 4.5: new classes get randomly initialised neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dreamkit.copying import copied
from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import device_of, eval_mode, seeded
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.tracing import trace
from dreamkit.types import ChannelRule
from dreamkit.wording import one_line

_CLOSE = 1e-4
"""Largest difference of old outputs that rounding makes, relative to the largest output."""


def find_head(
    model: nn.Module, input_size: tuple[int, int, int], rules: Sequence[ChannelRule] = ()
) -> str:
    """Return the name of the layer whose outputs are the model's, one for each class.

    Args:
        model: run once.
        input_size: (channels, height, width).
        rules: of layers and operations beside those that are known.

    Raises:
        TeacherMismatch: none is, or it is of a kind that cannot be given more outputs.
    """
    try:
        found = trace(model, input_size, rules, training_size=None)
    except Exception as error:  # the model is anyone's code
        reason = one_line(error.__cause__ or error)
        raise TeacherMismatch(f"the model's channels cannot be followed: {reason}") from error
    outputs = [found.find(label) for label in found.outputs]
    users = {
        name: axis
        for (name, axis), use in found.uses.items()
        if set(outputs) & {found.find(label) for label in use.labels}
    }
    if len(users) != 1:
        layers = ", ".join(users) or "none that can be told"
        raise TeacherMismatch(
            f"the head is of an unknown kind: outputs should come from one last layer, and here "
            f"the layers that have them are: {layers}"
        )
    ((name, axis),) = users.items()
    made = [found.find(label) for label in found.uses[name, axis].labels]
    module = model.get_submodule(name) if axis == "out" else None
    if made != outputs or not _can_grow(module):
        raise TeacherMismatch(
            f"the head is of an unknown kind: '{name}' makes the outputs, and should be a linear "
            f"layer or a 1x1 convolution with one output for each class (is "
            f"{type(module).__name__})"
        )
    return name


def _can_grow(module: nn.Module | None) -> bool:
    if isinstance(module, _ConvNd):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


def grow_head(
    model: nn.Module,
    input_size: tuple[int, int, int],
    outputs: int,
    seed: int,
    pruning_record: PruningRecord,
    rules: Sequence[ChannelRule] = (),
) -> str:
    """Give a model more outputs, in place, after those that it has; these stay as they are.

    The new neurons are initialised as PyTorch initialises a layer of this kind.

    Args:
        model: as it is.
        input_size: (channels, height, width).
        outputs: how many there are to be.
        seed: of the new weights.
        pruning_record: record of what was done to the model before, which is gone on with.
        rules: as of ``find_head``.

    Returns:
        The layer's name.

    Raises:
        TeacherMismatch: its head cannot be given more outputs; the model is unchanged.
    """
    name = find_head(model, input_size, rules)
    with seeded(seed):
        fresh: Any = copied(model.get_submodule(name)).cpu()
        size = "out_channels" if isinstance(fresh, _ConvNd) else "out_features"
        had = getattr(fresh, size)
        shape = (outputs, *fresh.weight.shape[1:])
        fresh.weight = nn.Parameter(torch.empty(shape))
        if fresh.bias is not None:
            fresh.bias = nn.Parameter(torch.empty(outputs))
        fresh.reset_parameters()
    new = {
        key: parameter.detach()[had:] for key, parameter in fresh.named_parameters(recurse=False)
    }
    trial = copied(model)
    PruningRecord().grow(trial, name, size, new)
    _check(model, trial, input_size, had, outputs)
    pruning_record.grow(model, name, size, new)
    return name


@torch.no_grad()
def _check(
    before: nn.Module, after: nn.Module, input_size: tuple[int, int, int], had: int, has: int
) -> None:
    """Hold a grown model against what it was.

    Raises:
        TeacherMismatch: what the first outputs are, or how many there are, is not as it should be.
    """
    device = device_of(after)
    noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(device)
    with eval_mode(before), eval_mode(after):
        expected: Tensor = before(noise)
        try:
            found: Any = after(noise)
        except Exception as error:  # the model is anyone's code
            reason = one_line(error)
            raise TeacherMismatch(f"the model does not run with more outputs: {reason}") from error
    if not isinstance(found, Tensor):
        raise TeacherMismatch(
            f"the model returns {type(found).__name__} once it has more outputs, not logits"
        )
    limit = _CLOSE * max(float(expected.abs().max()), 1e-6)
    if found.shape != (2, has) or float((found[:, :had] - expected).abs().max()) > limit:
        raise TeacherMismatch(
            "the head is of an unknown kind: with more neurons in its last layer the model's old "
            "outputs are not what they were"
        )
