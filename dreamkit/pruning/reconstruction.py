"""Fitting what pruning left of each layer to what the layer put out before, in closed form.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, eq. 5, over
dreams instead of data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.model_state import eval_mode
from dreamkit.pruning.activations import called_once, given, put_out, weighted_layers
from dreamkit.pruning.record import PruningRecord, select

_EXACT = 1e-2
"""Relative error of a layer's output that still is weights times patches; TF32 is off by less."""
_AT_ONCE = 2**27
"""Numbers in the patches that are unfolded at once (0.5 GB, with copies for a while)."""
_WIDEST = 8192
"""Inputs of a layer, k² times its channels: the equations of more fill memory and take hours."""


@torch.no_grad()
def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    pruning_record: PruningRecord,
    batches: Sequence[Tensor],
    masks: Mapping[str, Tensor] | None = None,
    ridge: float = 1e-3,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """Give each convolution and linear layer the weights that best put out what the teacher's does.

    Layer by layer in forward order, so that each also makes up for the errors before it:
    min_W ‖Y - W X‖² + λ‖W - W₀‖², with X the patches that the student's layer is given, Y what the
    teacher's layer of the same name puts out in the channels that are left, and W₀ the weights as
    they are. All else becomes the teacher's, BatchNorm's statistics of real data included, which
    hold as far as the layers before put out what the teacher's do.

    Layers that compute anything else than their weights times their patches (standardised
    weights, a padding of their own), those of more than 8,192 inputs, and those that a pass calls
    several times or never stay as they are.

    Args:
        student: changed in place.
        teacher: what it was pruned from.
        pruning_record: what it lacks of the teacher.
        batches: normalised images (N, C, H, W), on the device of both; the fit is over all.
        masks: by parameter name, 0 where a weight is to stay zero.
        ridge: λ as a share of the patches' mean square; a positive number keeps fits of few
            images sound.
        advance: told how many layers are done, and of how many.

    Returns:
        The names of the layers that were fitted.
    """
    _take_the_rest(student, teacher, pruning_record)
    fitted = []
    with eval_mode(student), eval_mode(teacher):
        names = called_once(student, batches[0])
        wanted: dict[str, list[Tensor]] = {}
        for number, name in enumerate(names):
            if name not in wanted:
                wanted = put_out(teacher, names[number:], batches)
            mask = None if masks is None else masks.get(f"{name}.weight")
            kept = _outputs_kept(pruning_record, name)
            if _fit(student, name, batches, wanted.pop(name), kept, mask, ridge):
                fitted.append(name)
            advance(number + 1, len(names))
    return fitted


def _take_the_rest(student: nn.Module, teacher: nn.Module, pruning_record: PruningRecord) -> None:
    """Make all but convolutions and linear layers the teacher's, as far as it is there."""
    theirs = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    own = {f"{name}.{key}" for name, m in weighted_layers(student) for key in m.state_dict()}
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        if name not in own:
            axes = pruning_record.kept.get(name)
            tensor.copy_(theirs[name] if axes is None else select(theirs[name], axes))


def _outputs_kept(pruning_record: PruningRecord, name: str) -> list[int] | None:
    axes = pruning_record.kept.get(f"{name}.weight")
    return axes[0] if axes else None


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies its weights with, (groups, inputs [+ 1], positions).

    A layer with a bias has a row of ones at the end.
    """
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding
        assert not isinstance(padding, str)
        columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        groups, count = layer.groups, columns.shape[1]
        rows = columns.view(len(x), groups, count // groups, -1).permute(1, 2, 0, 3).flatten(2)
    else:
        rows = x.flatten(0, -2).T[None]
    if _bias(layer) is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1, rows.shape[2])], dim=1)


def _outputs(layer: nn.Module, y: Tensor) -> Tensor:
    """Return what a layer puts out as (groups, outputs, positions)."""
    if not isinstance(layer, nn.Conv2d):
        return y.flatten(0, -2).T[None]
    groups = layer.groups
    return y.view(len(y), groups, y.shape[1] // groups, -1).permute(1, 2, 0, 3).flatten(2)


def _weights(layer: nn.Module) -> Tensor:
    """Return a layer's weights and bias as (groups, outputs, inputs [+ 1])."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.get_parameter("weight").detach().float()
    rows = weight.reshape(groups, len(weight) // groups, -1)
    bias = _bias(layer)
    return rows if bias is None else torch.cat([rows, bias.float().view(groups, -1, 1)], dim=2)


def _bias(layer: nn.Module) -> Tensor | None:
    parameter = layer._parameters.get("bias")
    return None if parameter is None else parameter.detach()


def _fit(
    student: nn.Module,
    name: str,
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    kept: list[int] | None,
    mask: Tensor | None,
    ridge: float,
) -> bool:
    """Fit one layer to what the teacher's puts out; return whether it is of a kind that can be."""
    layer = student.get_submodule(name)
    if not _is_plain(layer):
        return False
    before = _weights(layer)
    squares = products = torch.zeros(())
    checked = False
    for images, y in zip(batches, targets, strict=True):
        x = given(student, name, images)
        if not checked and not _is_product(layer, x[:2], before):
            return False
        checked = True
        if kept is not None:
            channels = 1 if isinstance(layer, nn.Conv2d) else y.dim() - 1
            y = y.index_select(channels, torch.tensor(kept, device=y.device))
        some = max(1, _AT_ONCE // (before[0, 0].numel() * before.shape[0] * y[0, 0].numel()))
        for part, wanted in zip(x.split(some), y.split(some), strict=True):
            patches = _patches(layer, part)
            squares = squares + patches @ patches.mT
            products = products + patches @ _outputs(layer, wanted).mT
    # In float64, which not every device has; these are small.
    _solve(layer, before, squares.cpu().double(), products.cpu().double(), mask, ridge)
    return True


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer says of itself that it only multiplies its weights."""
    weight = layer._parameters.get("weight")  # else it is computed from others
    if weight is None or weight[0].numel() > _WIDEST:
        return False
    own_padding = isinstance(layer, nn.Conv2d) and (
        isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    )
    return not own_padding


def _is_product(layer: nn.Module, x: Tensor, weights: Tensor) -> bool:
    """Whether a layer puts out its weights times its patches, and nothing else."""
    true = _outputs(layer, layer(x).float())
    try:
        product = weights @ _patches(layer, x)
    except RuntimeError:  # the images are smaller than the kernel: it pads them itself
        return False
    if true.shape != product.shape:
        return False
    return float((true - product).norm()) <= _EXACT * float(true.norm())


def _solve(
    layer: nn.Module,
    before: Tensor,
    squares: Tensor,
    products: Tensor,
    mask: Tensor | None,
    ridge: float,
) -> None:
    """Set a layer's weights to the solution of the normal equations.

    Args:
        layer: changed in place.
        before: its weights, (groups, outputs, inputs [+ 1]).
        squares: X Xᵀ, (groups, inputs [+ 1], inputs [+ 1]).
        products: X Yᵀ, (groups, inputs [+ 1], outputs).
        mask: of the weights, 0 where one is to stay zero.
        ridge: as ``reconstruct`` takes it.
    """
    old = before.cpu().double()
    size = squares.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    pull = ridge * size[:, None, None]
    left = squares + pull * torch.eye(squares.shape[1], dtype=torch.float64)
    right = products + pull * old.mT
    solved = torch.linalg.solve(left, right).mT if mask is None else _masked(left, right, old, mask)
    weight, bias = layer.get_parameter("weight"), _bias(layer)
    inputs = weight[0].numel()
    weight.copy_(solved[:, :, :inputs].reshape(weight.shape))
    if bias is not None:
        bias.copy_(solved[:, :, -1].flatten())


def _masked(left: Tensor, right: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """Return the solution in which each output has the inputs that its mask leaves it."""
    groups, outputs, inputs = old.shape
    there = torch.ones(groups, outputs, inputs, dtype=torch.bool)  # the bias always is
    flat = mask.reshape(groups, outputs, -1)
    there[:, :, : flat.shape[2]] = flat.cpu() != 0
    solved = torch.zeros_like(old)
    for group in range(groups):
        for output in range(outputs):
            on = there[group, output].nonzero().flatten()
            own = left[group][on[:, None], on]
            solved[group, output, on] = torch.linalg.solve(own, right[group, on, output])
    return solved
