"""What a rule about channels is given, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class ChannelRule(ABC):
    """An entry of ``channel_rules``: how one kind of layer, or one operation, treats channels.

    Beside every activation goes a tensor of integers of its shape: for each element the channel
    that it belongs to, 0 for none. A rule tells how those of the outputs come from those of the
    inputs, and which parameters have which channels. What is inside a layer that has a rule is not
    looked at. An operation is one of ``torch.ops.LIBRARY``; what is made of known ones needs no
    rule. The constructor has no options.

    Example:
        A layer of one's own with a factor for each channel, ``factor`` (1, C, 1, 1)::

            class ScaleRule(ChannelRule):
                targets = (Scale,)

                def follow(self, call):
                    (channels,) = call.channels
                    call.holds(channels, 1, {"factor": 1}, sizes=("num_channels",))
                    return channels
    """

    @property
    @abstractmethod
    def targets(self) -> Sequence[Any]:
        """Return the classes of layers, or the operations, that the rule is for."""

    @abstractmethod
    def follow(self, call: ChannelCall) -> Tensor | Sequence[Tensor | None] | None:
        """Tell what becomes of the channels in one call.

        Returns:
            The channel of every element of the output (int64, of its shape), or of each of several
            outputs. None if they cannot be followed: those that went in then stay.
        """


class ChannelCall(Protocol):
    """One call of a layer or an operation, as a rule sees it."""

    @property
    def name(self) -> str:
        """Name of the layer in the model, or of the operation."""

    @property
    def target(self) -> Any:
        """The layer, or the operation."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What it was given, with channels in the place of tensors."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """What it was given by name, likewise."""

    @property
    def channels(self) -> list[Tensor]:
        """The channels of every tensor that it was given, in their order."""

    @property
    def output(self) -> Any:
        """What it returned."""

    def holds(
        self,
        channels: Tensor,
        dim: int,
        tensors: Mapping[str, int],
        sizes: Sequence[str] = (),
        axis: str = "out",
    ) -> list[int]:
        """Note that a layer has what it is given: when channels go, it loses their share.

        Args:
            channels: of one of its inputs.
            dim: axis of that input along which they lie.
            tensors: by name in the layer, parameters and buffers that have them, and along which
                axis. One that is shorter has those of the first group.
            sizes: attributes of the layer that tell how many there are: integers, or tuples of one.
            axis: ``out`` if they come out of the layer, ``in`` if others do.

        Returns:
            The channel of each position along the axis.
        """

    def makes(
        self,
        count: int,
        dim: int,
        tensors: Mapping[str, int],
        sizes: Sequence[str] = (),
        groups: int = 1,
    ) -> Tensor:
        """Note that a layer makes new channels, and return those of its output.

        Args:
            count: how many.
            dim: axis of the output along which they lie.
            tensors: as of ``holds``.
            sizes: as of ``holds``.
            groups: in how many parts they lie, which lose the same places.
        """

    def along(self, channels: Tensor, dim: int) -> list[int]:
        """Return the channel of each position along an axis; where several meet, they stay."""

    def repeat(self) -> Any:
        """Do to the channels what was done to the elements: for what only moves them about."""

    def spread(self, along: Sequence[int], dim: int) -> Tensor:
        """Return the channels of the first output, given that of each position of an axis."""

    def couple_groups(self, along: Sequence[int], groups: int) -> None:
        """Let the channels at the same place of each group go together or not at all."""

    def fix(self, channels: Tensor | Sequence[int], reason: str) -> None:
        """Rule out that some channels are removed, and say why: "REASON" stands in reports."""
