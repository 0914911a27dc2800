"""First-order Taylor importance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from dreamkit.criteria.coupled import refuse_groups
from dreamkit.errors import DreamkitError, NothingToPrune
from dreamkit.model_state import frozen
from dreamkit.types import NO_LABEL, ChannelGroup, Criterion, PruningStep


@dataclass(frozen=True)
class Taylor(Criterion):
    """First-order Taylor importance of a channel, as its readers see it: (Σ gate·∂L/∂gate)².

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. A gate of 1
    multiplies each channel where a convolution or a linear layer reads it: removal sets that to 0.
    The gates of all its readers add up, the sum is squared, and the squares are averaged.

    The paper's gates stand behind BatchNorm. Through ReLU and a residual sum that is the same
    number, but where one BatchNorm follows another before anything reads (as around a depthwise
    convolution) each such gate tells of the same removal, and their sum tells of it twice.

    Args:
        loss: ``kl`` is KL(p_T ‖ p_pruned), which needs no labels, with its gradient estimated by
            that of the cross-entropy to one label an image, drawn from the teacher's softmax.
            At first student and teacher are one, the KL is at its minimum and has no gradient,
            but the squared gradients of drawn labels average to its curvature (the Fisher
            information), so the ranking holds from the first step. ``exact_kl`` is the plain
            gradient. ``ce`` is cross-entropy to the images' labels.
        squares: of the loss of each ``image`` (as in Fisher pruning; Theis et al. 2018), or of the
            mean loss of each ``batch`` (the paper). At first, for ``kl``, both estimate the same
            but for a factor, and a square a batch says little: over four it is off by 70 %.
        temperature: of both softmaxes, for ``kl`` and ``exact_kl``.
        ema: share of the earlier steps' importances in each step's, a moving average; 0 forgets
            them.
    """

    loss: Literal["kl", "exact_kl", "ce"] = "kl"
    squares: Literal["image", "batch"] = "image"
    temperature: Annotated[float, Field(gt=0)] = 3.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Refuse groups that no layer reads.

        Raises:
            NothingToPrune: there are some.
        """
        unread = [group for group in groups if all(m.axis != "in" for m in group.members)]
        refuse_groups(unread, "layer that reads channels", instead="")

    def __call__(self, step: PruningStep) -> list[Tensor]:
        """Return importances >= 0, one tensor (channels,) for each group.

        Raises:
            DreamkitError: ``loss: ce`` of images without labels.
            NothingToPrune: no layer reads a group, or one that the model does not call, or calls
                with other than an image a row.
        """
        scores = [torch.zeros(group.channels) for group in step.groups]
        layers = [reading_layers(group) for group in step.groups]
        wanted = {name for names in layers for name in names}
        count = 0
        with frozen(step.model), _gates(step.model, wanted) as gates:
            for images, labels in step.batches():
                gates.clear()
                loss = self._loss(step, images, labels)
                # A head that training alone runs reads channels too, and moves no output here.
                unseen = [names for names in layers if not gates.keys() & {*names}]
                if unseen:
                    raise NothingToPrune(
                        f"{', '.join(unseen[0])} cannot be gated: the model takes its weights and "
                        "does not call it"
                    )
                gradients = _gradients(loss, gates, len(images), self.squares == "image")
                for score, group in zip(scores, step.groups, strict=True):
                    sums = gate_gradients(group, gradients)
                    score += sums.square().sum(0)
                count += len(images) if self.squares == "image" else 1
        found = [score / max(count, 1) for score in scores]
        if self.ema == 0 or step.earlier is None:
            return found
        return [
            torch.lerp(new, old, self.ema) for new, old in zip(found, step.earlier, strict=True)
        ]

    def _loss(self, step: PruningStep, images: Tensor, labels: Tensor) -> Tensor:
        logits = step.model(images)
        if self.loss == "ce":
            if int(labels.min()) == NO_LABEL:
                raise DreamkitError("taylor with loss: ce needs images with labels", ("criteria",))
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            target = F.softmax(step.teacher(images) / self.temperature, dim=1)
        if self.loss == "exact_kl":
            log_p = F.log_softmax(logits / self.temperature, dim=1)
            return F.kl_div(log_p, target, reduction="batchmean")
        drawn = torch.multinomial(target.cpu(), 1, generator=step.generator).squeeze(1)
        return F.cross_entropy(logits / self.temperature, drawn.to(logits.device))


def reading_layers(group: ChannelGroup) -> list[str]:
    """Return the layers before which a group's gates stand: those that read its channels.

    Raises:
        NothingToPrune: there is none.
    """
    found = [member.layer for member in group.members if member.axis == "in"]
    if not found:
        raise NothingToPrune(f"the channel group {group.name} has no layer that reads its channels")
    return list(dict.fromkeys(found))


def gate_gradients(group: ChannelGroup, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return Σ gate·∂L/∂gate over a group's gates, (N, channels).

    Args:
        group: channels that can only be removed together.
        gradients: by layer before which gates stand, of each image and input (N, C).
    """
    total = torch.zeros(len(next(iter(gradients.values()))), group.channels)
    for member in group.members:
        if member.axis == "in" and member.layer in gradients:
            total.index_add_(1, member.channel, gradients[member.layer][:, member.index])
    return total


@contextmanager
def _gates(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Multiply what layers read by gates of 1, one for each image and channel.

    Yields:
        The gates of every call by layer, until the dictionary is emptied.
    """
    gates: dict[str, list[Tensor]] = defaultdict(list)

    def gate(name: str, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        given, structure = tree_flatten((args, kwargs))
        place = next(i for i, value in enumerate(given) if isinstance(value, Tensor))
        read = given[place]
        # A linear layer reads the last axis, of images with channels last too.
        first = isinstance(layer, _ConvNd) or (read.dim() == 4 and not isinstance(layer, nn.Linear))
        channels = 1 if first else read.dim() - 1
        shape = [size if dim in (0, channels) else 1 for dim, size in enumerate(read.shape)]
        ones = torch.ones(shape, dtype=read.dtype, device=read.device, requires_grad=True)
        gates[name].append(ones)
        given[place] = read * ones
        return tree_unflatten(given, structure)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(gate, name), with_kwargs=True)
        for name in names
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _gradients(
    loss: Tensor, gates: Mapping[str, Sequence[Tensor]], images: int, of_each: bool
) -> dict[str, Tensor]:
    """Return ∂L/∂gate by layer, float32 on the CPU; several calls of a layer add up.

    Args:
        loss: the mean over the images.
        gates: as ``_gates`` yields them.
        images: how many.
        of_each: each image's own loss in a row of its own (N, C); else the mean's, (1, C).

    Raises:
        NothingToPrune: a layer is given other than an image a row, and rows were wanted.
    """
    calls = [(name, gate) for name, called in gates.items() for gate in called]
    wanted = [gate for _, gate in calls]
    found = torch.autograd.grad(images * loss if of_each else loss, wanted, materialize_grads=True)
    totals: dict[str, Tensor] = {}
    for (name, gate), gradient in zip(calls, found, strict=True):
        rows = gradient.float().reshape(len(gate), -1).cpu()
        if not of_each:
            rows = rows.sum(0, keepdim=True)
        elif len(rows) != images:
            raise NothingToPrune(
                f"{name} is given {len(rows)} rows for {images} images, which then have no "
                "gradients of their own: set 'squares: batch' of taylor"
            )
        totals[name] = totals.get(name, torch.zeros(())) + rows
    return totals
