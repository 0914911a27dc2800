"""Which channels can only be removed together: torch-pruning's dependency graph, made plain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.model_state import device_of, eval_mode, hooked
from dreamkit.types import ChannelGroup, Member

_LAYERS = (nn.Conv2d, nn.Linear)


class FrozenBatchNormPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts torchvision's frozen BatchNorm, whose weights are buffers."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove some channels from every buffer."""
        buffers = dict(layer.named_buffers(recurse=False))
        keep = sorted(set(range(self.get_out_channels(layer))) - set(idxs))
        for name, buffer in buffers.items():
            setattr(layer, name, buffer[keep])
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return how many channels the layer normalises."""
        return len(dict(layer.named_buffers(recurse=False))["weight"])

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


@dataclass(frozen=True)
class Skipped:
    """A channel group that cannot be pruned, and why."""

    group: str
    reason: str


class ChannelGraph:
    """The channel groups of a model, kept true while channels are removed.

    Args:
        model: as it now is; traced once, here.
        input_size: (channels, height, width).
        num_classes: outputs; the layers that make them are left alone.
    """

    def __init__(
        self, model: nn.Module, input_size: tuple[int, int, int], num_classes: int
    ) -> None:
        self.model = model
        example = torch.zeros(1, *input_size, device=device_of(model))
        self.classifier = classifier_layers(model, example, num_classes)
        # Normalisation layers in eval mode take a batch of one; gradients are what is traced.
        frozen = [p for p in model.parameters() if not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with eval_mode(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph = tp.DependencyGraph().build_dependency(
                    model,
                    example,
                    verbose=False,
                    customized_pruners={FrozenBatchNorm2d: FrozenBatchNormPruner()},
                )
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        self._names = {module: name for name, module in model.named_modules()}

    def groups(self) -> tuple[list[ChannelGroup], list[Skipped]]:
        """Return the groups that can be pruned, and those that cannot."""
        ignored = [self.model.get_submodule(name) for name in self.classifier]
        found, skipped = [], []
        for group in self._graph.get_all_groups(
            ignored_layers=ignored, root_module_types=list(_LAYERS)
        ):
            name = self._names[group[0].dep.target.module]
            reason = self._obstacle(group)
            if reason is not None:
                skipped.append(Skipped(name, reason))
                continue
            channels = len(group[0].idxs)
            found.append(ChannelGroup(name, channels, tuple(self._members(group))))
        skipped += [Skipped(name, "makes the model's outputs") for name in self.classifier]
        return found, skipped

    def remove(self, group: ChannelGroup, channels: Sequence[int]) -> None:
        """Remove some of a group's channels from every layer that has them."""
        root = self.model.get_submodule(group.name)
        prune = self._graph.get_pruner_of_module(root).prune_out_channels
        self._graph.get_pruning_group(root, prune, sorted(channels)).prune(record_history=False)

    def _members(self, group: Any) -> list[Member]:
        members: dict[tuple[str, str], Member] = {}
        for item in group:
            dep, module = item.dep, item.dep.target.module
            if module not in self._names or not list(module.parameters(recurse=False)):
                continue
            out = self._graph.is_out_channel_pruning_fn(dep.handler) or _is_depthwise(module)
            name = self._names[module]
            axis = "out" if out else "in"
            index, channel = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            if (known := members.get((name, axis))) is not None:
                index = torch.cat([known.index, index])
                channel = torch.cat([known.channel, channel])
            members[name, axis] = Member(name, axis, index, channel)
        return list(members.values())

    def _obstacle(self, group: Any) -> str | None:
        for item in group:
            dep, module = item.dep, item.dep.target.module
            out = self._graph.is_out_channel_pruning_fn(dep.handler)
            if out and self._names.get(module) in self.classifier:
                return f"meets the model's outputs in {self._names[module]}"
            if isinstance(module, nn.Conv2d) and module.groups > 1 and not _is_depthwise(module):
                return f"{self._names[module]} is a grouped convolution"
            # The axes of an image batch, last first: width, height, channels.
            if any(getattr(dep.target.grad_fn, "_saved_pad", ())[4:6]):
                return "its channels meet others beside padded zeros, which shift them"
            if isinstance(module, nn.Parameter):
                return "depends on a parameter outside any layer"
            if dep.target.module in self._names and None in item.root_idxs:
                return f"its channels cannot be followed to {self._names[module]}"
        return None


def _is_depthwise(module: object) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def classifier_layers(model: nn.Module, example: Tensor, num_classes: int) -> list[str]:
    """Return the layers that make the outputs.

    That is the last convolution or linear layer in forward order with ``num_classes`` outputs (in
    some models, e.g. DLA, a 1×1 convolution), or the last one of all if none has.
    """
    order: list[tuple[str, int]] = []

    def see(name: str, module: nn.Module, _: Tensor) -> None:
        outputs = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        order.append((name, int(outputs)))  # type: ignore[arg-type]

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _LAYERS)]
    with torch.no_grad(), eval_mode(model), hooked(layers, see):
        model(example)
    matching = [name for name, outputs in order if outputs == num_classes]
    return [matching[-1] if matching else order[-1][0]]
