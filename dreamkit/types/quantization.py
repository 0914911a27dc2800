"""Networks in integers, as files that a runtime reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class QuantizationStep:
    """What a quantizer works on.

    Args:
        model: in eval mode, on the CPU; takes normalised images (N, C, H, W), returns (N, K). It
            stays as it is.
        batches: begins another pass over the calibration images, normalised (N, C, H, W), on the
            CPU; the last batch may be smaller.
        folder: for files of the work; it goes with the work.
        note: told what the user must know.
        advance: told what share of the work is done, in [0, 1].
    """

    model: nn.Module
    batches: Callable[[], Iterator[Tensor]]
    folder: Path
    note: Callable[[str], None]
    advance: Callable[[float], None]


@dataclass(frozen=True)
class FileLook:
    """What is seen in a file in integers; empty where a quantizer cannot tell.

    Args:
        noise: signal-to-noise ratio of every layer's output in dB, held against the network in
            float, by its name in forward order.
        in_float: how many operators of each type compute in float.
    """

    noise: Mapping[str, float] = field(default_factory=dict)
    in_float: Mapping[str, int] = field(default_factory=dict)


class Simulation(nn.Module, ABC):
    """What a file in integers computes, with gradients: normalised images to outputs (N, K)."""

    @abstractmethod
    def trained(self) -> Quantization:
        """Return the network in integers as it has become."""


class Quantization(ABC):
    """A network whose ranges are known: it can be written with more layers in integers or fewer."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that may stay in float, in forward order; none if it cannot tell."""
        return ()

    @abstractmethod
    def write(self, path: Path, keep_float: Collection[str] = ()) -> None:
        """Write the file in integers.

        Args:
            path: of the file.
            keep_float: those of ``layers`` that stay in float.
        """

    @abstractmethod
    def write_float(self, path: Path) -> None:
        """Write the network in float for the same runtime, to be compared with."""

    def simulated(self, keep_float: Collection[str] = ()) -> Simulation | None:
        """Return what the file computes as a network that can be trained; None if there is none.

        Args:
            keep_float: those of ``layers`` that stay in float.
        """
        return None

    def look(self, path: Path, images: Tensor) -> FileLook:
        """Return how much noise integers make of every layer, and what stayed in float.

        Args:
            path: of a file that ``write`` wrote.
            images: normalised (N, C, H, W), for the noise.
        """
        return FileLook()

    def describe(self) -> Mapping[str, Any]:
        """Return what the file's JSON says of it: backend, version, settings, ranges."""
        return {}


class Quantizer(ABC):
    """An entry of ``quantizers``: a way to write a network in integers for a runtime.

    Any method may raise whatever it likes: the user is told that the network cannot be quantised,
    and why.
    """

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Ending of the file's name, such as ``.int8.onnx``."""

    @property
    def faster(self) -> bool:
        """Whether a file is to be faster than float; if it is not then, a run says so."""
        return True

    @property
    def calibrates(self) -> bool:
        """Whether images decide on its files: their ranges are taken, and can be trained."""
        return True

    @abstractmethod
    def calibrate(self, step: QuantizationStep) -> Quantization:
        """Export a network and take the ranges of its activations."""

    @abstractmethod
    def load(
        self, path: Path, threads: int | None = None, exact: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return what runs a file: images (N, C, H, W) on the CPU to outputs (N, K).

        Args:
            path: of a file that ``Quantization`` wrote, in integers or in float.
            threads: that it runs on; None leaves the choice to the runtime.
            exact: without the saturation of sums that fast kernels may have; where there is no such
                thing it makes no difference.
        """

    def note(self) -> str | None:
        """Return what the user must know of it on this machine, if anything."""
        return None
