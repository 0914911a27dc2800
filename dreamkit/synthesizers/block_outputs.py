"""What the blocks of a teacher put out, patch by patch: which modules, and in what shape.

It needs no normalisation, and nothing of a library: outputs of modules are taken as they come, so
that attention may be computed by whatever kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import eval_mode, hooked
from dreamkit.pruning.activations import called_once, weighted_layers
from dreamkit.pruning.blocks import residual_blocks
from dreamkit.regularizers.cosines import evenly_spread
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import Teacher

MOST_PATCHES = 196
"""Of an image, 14 by 14, that are looked at: the first blocks of a network have thousands."""
_MOST_EXTRA = 16
"""Tokens that may stand before those of patches: of the class, of distillation, registers."""


@dataclass(frozen=True)
class Block:
    """A module whose output has patches.

    Args:
        name: the module's.
        channels_last: whether channels are its output's last axis; else they are the second.
        extra: tokens before those of patches.
    """

    name: str
    channels_last: bool
    extra: int = 0

    def patches(self, output: Tensor) -> Tensor:
        """Return ``MOST_PATCHES`` patches at the most, evenly spread, (N, P, C), as a copy.

        What follows the block may change its output in place.

        Args:
            output: of the module, (N, T, C), (N, H, W, C) or (N, C, H, W).
        """
        axis = 1 if self.channels_last else 2
        end = output.dim() - 2 if self.channels_last else output.dim() - 1
        flat = output.flatten(axis, end)
        count = flat.shape[axis] - self.extra
        places = evenly_spread(count, MOST_PATCHES, flat.device) + self.extra
        patches = flat.index_select(axis, places)
        return patches if self.channels_last else patches.transpose(1, 2)


def feature_blocks(teacher: Teacher) -> list[Block]:
    """Return the blocks of a teacher whose outputs have patches, in forward order.

    These are its residual blocks, as vision transformers, Swin and ConvNeXt consist of them. A
    network without any (VGG, AlexNet) has its convolutions and the linear layers over tokens
    instead, before their activation. Outputs that are one vector for an image have no patches.

    Returns:
        None at all for a network of TorchScript, which takes no hooks.
    """
    model, size = teacher.model, teacher.card.input_size
    if isinstance(model, torch.jit.ScriptModule):
        return []
    images = blank_noise(model, size)
    found = _with_patches(model, residual_blocks(model, images), images)
    if not found:
        with torch.no_grad(), eval_mode(model):
            names = called_once(model, images)
        found = _with_patches(model, names, images)
    return found


def check_patches(teacher: Teacher, size: tuple[int, int]) -> None:
    """Refuse images that the first layer cuts into patches with a rest that none of them holds.

    Args:
        teacher: its first layer may be a convolution whose stride is its kernel's size.
        size: height and width of images.

    Raises:
        TeacherMismatch: naming the patches and the rest.
    """
    first: list[nn.Conv2d] = []
    convolutions = [(n, m) for n, m in teacher.model.named_modules() if type(m) is nn.Conv2d]
    with (
        torch.no_grad(),
        eval_mode(teacher.model),
        hooked(convolutions, lambda name, module, x: first.append(module)),  # type: ignore[arg-type]
    ):
        teacher.model(blank_noise(teacher.model, teacher.card.input_size))
    if (
        not first
        or first[0].kernel_size != first[0].stride
        or first[0].padding not in ((0, 0), "valid")
    ):
        return
    high, wide = first[0].kernel_size
    rest = size[0] % high, size[1] % wide
    if any(rest):
        fit = size[0] - rest[0], size[1] - rest[1]
        raise TeacherMismatch(
            f"{teacher.card.name} cuts images into patches of {high}x{wide} pixels, which do not "
            f"divide images of {size[0]}x{size[1]}: {rest[0]} rows and {rest[1]} columns at the "
            "edge are in no patch, so nothing would shape them. Give it images of "
            f"{fit[0]}x{fit[1]}"
        )


class BlockTap:
    """Keeps the patches that blocks put out in a model's last forward pass."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def see(self, block: Block, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Note one block's output."""
        self._seen[block.name] = block.patches(output)

    def outputs(self) -> tuple[Tensor, ...]:
        """Return each block's patches, (N, P, C), float32, in forward order."""
        found = tuple(patches.float() for patches in self._seen.values())
        self._seen.clear()  # they hold the graph of the pass
        return found


@contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[Block]) -> Iterator[BlockTap]:
    """Hook some blocks for as long as the context lasts, to see what they put out."""
    tap = BlockTap()
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.name)
            stack.callback(module.register_forward_hook(partial(tap.see, block)).remove)
        yield tap


def _with_patches(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Block]:
    """Return those of some modules whose outputs for images have two patches or more."""
    found: list[Block] = []

    def see(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        block = _block(name, module, output, images)
        if block is not None:
            found.append(block)

    with ExitStack() as stack, torch.no_grad(), eval_mode(model):
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(see, name)).remove)
        model(images)
    return found


def _block(name: str, module: nn.Module, output: Any, images: Tensor) -> Block | None:
    """Return how a module lays patches out; None if an image has none of its own."""
    if not isinstance(output, Tensor) or len(output) != len(images) or output.dim() not in (3, 4):
        return None
    if output.dim() == 4:
        block = Block(name, _channels_last(module, output))
    else:
        grid = patch_grid(output.shape[1], *images.shape[2:])
        block = Block(name, True, 0 if grid is None else grid[2])
    return block if block.patches(output).shape[1] > 1 else None


def _channels_last(module: nn.Module, output: Tensor) -> bool:
    """Whether channels are the last axis of a block's output of four axes.

    They are as many as its last layer puts out. Where both axes have that size, a block with a
    convolution has them second, as convolutions do.
    """
    layers = [layer for _, layer in weighted_layers(module)]
    last = layers[-1]
    width = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    if (output.shape[1] == width) != (output.shape[-1] == width):
        return bool(output.shape[-1] == width)
    return all(isinstance(layer, nn.Linear) for layer in layers)


def patch_grid(tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
    """Return how tokens lie over an image of a size: rows, columns, and how many stand before them.

    None where square patches make no grid of as many, or but few more, as there are tokens.
    """
    for patch in range(1, min(height, width) + 1):
        rows, columns = height // patch, width // patch
        if rows * columns <= tokens and height % patch == 0 and width % patch == 0:
            extra = tokens - rows * columns
            return (rows, columns, extra) if extra <= min(_MOST_EXTRA, rows * columns) else None
    return None
