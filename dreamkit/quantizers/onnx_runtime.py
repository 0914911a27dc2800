"""INT8 for ONNX Runtime: a file with quantize and dequantize operators (QDQ)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError, OptionError, import_extra
from dreamkit.onnx_int8 import NUMBERS
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.quantizers.bias_correction import MeanInputs, corrected, corrections
from dreamkit.quantizers.equalisation import (
    ChannelRanges,
    equalise_activations,
    equalise_weights,
    pairs_of,
)
from dreamkit.quantizers.float_graph import FloatGraph
from dreamkit.quantizers.qdq_file import OnnxQuantization
from dreamkit.quantizers.ranges import Histograms, MinMax, least_error
from dreamkit.quantizers.targets import Target, resolved, this_processor, told
from dreamkit.quantizers.watching import WATCHED, values_of
from dreamkit.types import Quantization, QuantizationStep, Quantizer

_POWERS = {"mse": 2.0, "third power": 3.0, "fourth power": 4.0}
"""Of errors, by which ranges are chosen that are then tried on the logits."""


@dataclass(frozen=True)
class OnnxQuantizer(Quantizer):
    """Static INT8 in ONNX, run by ONNX Runtime. Needs the extra ``onnx``.

    Weights are symmetric about zero. Operators that ONNX Runtime has no integers for stay in float.

    Args:
        weights: ``int8``; or ``int4`` for a smaller file, not a faster one: with activations of 8
            bits, and steps of weights by the least error. ONNX Runtime makes these weights
            float when it loads the file, and no other runtime reads it. Train in integers with it.
        target: the processor that the file will meet. ``portable``: weights of 7 bits, right on any
            x86 and ARM. ``vnni``: 8 bits, for x86 with VNNI; on others sums of products saturate.
            ``arm``: signed activations. ``tensorrt``: signed and symmetric, with operators on the
            weights. ``auto``: what suits this machine's processor, and says so.
        per_channel: a scale for each output channel of the weights, not one for all.
        ranges: of activations. ``minmax``: all that the calibration images show. ``mse``: by the
            least squared error, which cuts off what is rare. ``logits``: of both and two between,
            for the whole network, what changes the outputs least.
        bias_correction: take back what rounding weights does to the mean of a layer's outputs
            (Nagel et al., ICCV 2019).
        equalise: make the ranges of channels between two layers alike, in float, before anything is
            rounded (the same paper, section 4.1); where only a ``Relu`` or the like is between.
    """

    weights: Literal["int8", "int4"] = "int8"
    target: Target = "portable"
    per_channel: bool = True
    ranges: Literal["minmax", "mse", "logits"] = "minmax"
    bias_correction: bool = True
    equalise: bool = False

    def __post_init__(self) -> None:
        if self.weights == "int4" and self.target == "tensorrt":
            raise OptionError(
                "weights",
                "set it to int8: a file with weights of 4 bits has operators of ONNX Runtime's "
                "own, which TensorRT does not read",
            )

    @property
    def suffix(self) -> str:
        """Ending of the file's name."""
        return f".{self.weights}.onnx"

    @property
    def faster(self) -> bool:
        """Whether a file is to be faster than float."""
        return self.weights == "int8"

    def calibrate(self, step: QuantizationStep) -> Quantization:
        """Export a network and take the ranges of its activations."""
        import_extra("onnxruntime", "onnx")
        first = next(iter(step.batches()))
        graph = FloatGraph(as_onnx(step.model, first, any_batch=True))
        return self.calibrate_graph(graph, step)

    def calibrate_graph(self, graph: FloatGraph, step: QuantizationStep) -> OnnxQuantization:
        """Take the ranges of a network that is exported already.

        Raises:
            DreamkitError: there is nothing that could be integers, or a range is not finite.
        """
        if not graph.layers:
            raise DreamkitError("the network has no layer with weights that could be integers")
        if self.equalise:
            graph = _equalised(graph, step, self.per_channel)
        return _Calibration(self, graph, step).done()

    def load(
        self, path: Path, threads: int | None = None, exact: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return what runs a file."""
        return OnnxSession(path, threads, torch.zeros(()), exact=exact).run

    def note(self) -> str | None:
        """Return what the user must know of the target on this machine."""
        if self.weights == "int4":
            return (
                "weights of 4 bits make the file small, not fast: ONNX Runtime makes them float "
                "when it loads it, computes layers in float and rounds between, which can be "
                "slower than float"
            )
        return told(self.target)


def _equalised(graph: FloatGraph, step: QuantizationStep, per_channel: bool) -> FloatGraph:
    """Return a graph of the same outputs whose channels have ranges alike."""
    graph = FloatGraph(graph.serialised())
    pairs = pairs_of(graph)
    if not pairs:
        step.note(
            "equalise has no effect: no two layers have nothing but a Relu or the like between"
        )
    elif per_channel:
        channels = ChannelRanges(pairs)
        parts = (part for batch in step.batches() for part in batch.split(WATCHED))
        for values in values_of(graph.proto, channels.tensors, parts):
            channels.see(values)
        equalise_activations(graph, pairs, channels.ranges)
    else:
        equalise_weights(graph, pairs)
    return graph


@dataclass(frozen=True)
class _Calibration:
    """Takes ranges and corrections of a network."""

    options: OnnxQuantizer
    graph: FloatGraph
    step: QuantizationStep

    def done(self) -> OnnxQuantization:
        """Return the network, ready to be written."""
        options, graph = self.options, self.graph
        target = resolved(options.target)
        widest, means = MinMax(), MeanInputs(corrected(graph.layers))
        for values in self._values(graph.tensors):
            widest.see(values)
            means.see(values)
        self.step.advance(0.3)
        made = OnnxQuantization(
            numbers=NUMBERS[target] if options.faster else replace(NUMBERS[target], weight_bits=4),
            per_channel=options.per_channel,
            graph=graph,
            ranges=widest.ranges,
            shifts={},
            folder=self.step.folder,
            told={
                "target": target,
                "processor": this_processor().describe(),
                "range_choice": "minmax",
                "bias_correction": options.bias_correction,
                "equalise": options.equalise,
            },
        )
        if options.ranges != "minmax":
            counted = Histograms({name: widest.ranges[name] for name in graph.ranged})
            for values in self._values(graph.ranged):
                counted.see(values)
            self.step.advance(0.6)
            found = [self._with_least(made, counted, name) for name in _POWERS]
            made = self._best([made, *found]) if options.ranges == "logits" else found[0]
        self.step.advance(0.9)
        if options.bias_correction:
            shifts = corrections(graph, means.means(), made.rounded_weights())
            made = replace(made, shifts=shifts)
        return made

    def _with_least(
        self, made: OnnxQuantization, counted: Histograms, power: str
    ) -> OnnxQuantization:
        """Return the same with ranges of the least error."""
        ranges = {
            name: least_error(histogram, made.numbers.symmetric, _POWERS[power])
            for name, histogram in counted.histograms().items()
        }
        told = {**made.told, "range_choice": power}
        return replace(made, ranges={**made.ranges, **ranges}, told=told)

    def _best(self, tried: list[OnnxQuantization]) -> OnnxQuantization:
        """Return what changes the logits of the calibration images least."""
        errors = [0.0] * len(tried)
        right = OnnxSession(self.graph.serialised(), None, torch.zeros(()))
        sessions = [candidate.session() for candidate in tried]
        for images in self.step.batches():
            expected = right.run(images)
            for number, session in enumerate(sessions):
                errors[number] += float((session.run(images) - expected).square().sum())
        return tried[errors.index(min(errors))]

    def _values(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of the calibration images, a few images at a time."""
        parts = (part for batch in self.step.batches() for part in batch.split(WATCHED))
        return values_of(self.graph.proto, names, parts)
