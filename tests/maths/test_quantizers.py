"""INT8: ranges, corrections and files, held against what is worked out by hand."""

from __future__ import annotations

import functools
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.quantizers.bias_correction import MeanInputs, corrected, corrections
from dreamkit.quantizers.float_graph import FloatGraph
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.quantizers.ranges import Histogram, Histograms, MinMax, least_error
from dreamkit.quantizers.signal_to_noise import decibels
from dreamkit.quantizers.targets import Processor, this_processor
from dreamkit.quantizers.watching import values_of
from dreamkit.quantizers.weight_steps import least_error_steps
from dreamkit.types import QuantizationStep

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

EXAMPLE = torch.zeros(())


@functools.cache
def _exported(kind, size, weights):
    return as_onnx(weights.model, torch.zeros(2, *size), any_batch=True)


class _Weights:
    """A network that is equal to another of the same weights: exporting takes seconds."""

    def __init__(self, model):
        self.model = model
        self.values = torch.cat(
            [torch.zeros(0), *(v.flatten() for v in model.state_dict().values())]
        )

    def __hash__(self):
        return len(self.values)

    def __eq__(self, other):
        return torch.equal(self.values, other.values)


def exported(model, size):
    return _exported(type(model), tuple(size), _Weights(model.eval()))


def quantized(model, images, folder, **options):
    """Return a network with its ranges, of a quantizer with options."""
    step = QuantizationStep(
        model=model.eval(),
        batches=lambda: iter(images.split(5)),
        folder=folder,
        note=lambda text: None,
        advance=lambda share: None,
    )
    graph = FloatGraph(exported(model, images.shape[1:]))
    return OnnxQuantizer(**options).calibrate_graph(graph, step)


def outputs(proto, images, **options):
    return OnnxSession(proto.SerializeToString(), 1, EXAMPLE, **options).run(images)


def constants(proto):
    return {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer}


# Ranges.


def test_a_range_is_of_all_batches_and_has_zero():
    seen = MinMax()
    seen.see({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([-2.0])})
    seen.see({"a": torch.tensor([2.0, 5.0]), "b": torch.tensor([-1.0])})
    assert seen.ranges == {"a": (0.0, 5.0), "b": (-2.0, 0.0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_have_no_range(value):
    with pytest.raises(DreamkitError, match=r"not finite, which have no range: at second\."):
        MinMax().see({"first": torch.ones(2), "second": torch.tensor([0.0, value])})


def test_a_histogram_does_not_depend_on_how_images_come():
    values = torch.linspace(-1, 3, 5001)
    found = []
    for size in (5001, 700):
        counted = Histograms({"a": (-1.0, 3.0)})
        for part in values.split(size):
            counted.see({"a": part})
        found.append(counted.histograms()["a"].counts)
    assert torch.equal(*found)
    assert found[0].sum() == 5001


def rounded(values, low, high):
    """Quantise as a byte with a zero point does."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale


def histogram_of(values):
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counted = Histograms({"a": (low, high)})
    counted.see({"a": values})
    return counted.histograms()["a"]


def test_what_is_rare_is_cut_off_for_the_least_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.rand(1_000_000, generator=generator), torch.tensor([4.0])])
    low, high = least_error(histogram_of(values), signed=False)
    assert low == 0
    assert 0.9 < high < 2.5

    def error(end):
        return float((rounded(values, 0.0, end) - values).square().sum())

    # The one value of 4 is cut, so that the steps of the rest are narrower.
    assert error(high) < error(4.0)
    _, minded = least_error(histogram_of(values), signed=False, power=8)
    assert minded > high


def test_both_ends_move_by_themselves():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50_000, generator=generator).clamp(min=-0.5)
    low, high = least_error(histogram_of(values), signed=False)
    assert -0.51 < low < -0.4
    assert 2.5 < high <= float(values.max())
    low, high = least_error(histogram_of(values), signed=True)
    assert low == -high


@pytest.mark.parametrize("signed", [False, True])
def test_a_tensor_of_one_value_keeps_its_range(signed):
    assert least_error(Histogram((0.0, 0.0), torch.zeros(2048)), signed) == (0.0, 0.0)


def test_ranges_by_the_logits_are_those_of_least_error(toys, tmp_path):
    model, images = toys.residual(), toys.card().normalise(toys.images(20).images)
    right = model(images).detach()

    def error(ranges):
        made = quantized(model, images, tmp_path, ranges=ranges, bias_correction=False)
        return float((outputs(made.proto(), images) - right).square().sum())

    assert error("logits") <= min(error("minmax"), error("mse")) * (1 + 1e-6)


# Targets.


@pytest.mark.parametrize(
    ("machine", "flags", "target"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "vnni"),
        ("x86_64", {"avx2"}, "portable"),
        ("AMD64", set(), "portable"),
        ("aarch64", set(), "arm"),
        ("arm64", set(), "arm"),
    ],
)
def test_the_target_of_a_processor(machine, flags, target):
    assert Processor(machine, frozenset(flags)).target == target


@pytest.mark.parametrize(("target", "largest"), [("portable", 64), ("vnni", 127), ("arm", 127)])
def test_weights_are_the_nearest_integers_of_their_channel(toys, tmp_path, target, largest):
    model, images = toys.plain(), toys.card().normalise(toys.images(8).images)
    found = constants(quantized(model, images, tmp_path, target=target).proto())
    weight = model.conv1.weight.detach()
    scale = weight.abs().amax((1, 2, 3)) / largest
    expected = (weight / scale.view(-1, 1, 1, 1)).round()
    torch.testing.assert_close(found["conv1.weight_scale"], scale)
    assert torch.equal(found["conv1.weight_quantized"].float(), expected)
    zero = found["images_zero_point"]
    assert zero.dtype == (torch.int8 if target == "arm" else torch.uint8)


def test_one_scale_for_all_channels(toys, tmp_path):
    images = toys.card().normalise(toys.images(8).images)
    found = constants(quantized(toys.plain(), images, tmp_path, per_channel=False).proto())
    assert found["conv1.weight_scale"].dim() == 0


def test_a_file_for_tensorrt_has_pairs_on_weights_and_no_zero_points(toys, tmp_path):
    images = toys.card().normalise(toys.images(8).images)
    made = quantized(toys.residual(), images, tmp_path, target="tensorrt").proto()
    given = {node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert {"conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"} <= given
    zeros = [value for name, value in constants(made).items() if name.endswith("zero_point")]
    assert zeros
    assert all(bool((value == 0).all()) for value in zeros)
    right = toys.residual()(images).detach()
    assert decibels(*_powers(outputs(made, images), right)) > 20


def _powers(found, right):
    return float(right.square().sum()), float((found - right).square().sum())


# Weights of 4 bits.


def test_steps_of_least_error_cut_off_what_is_rare():
    rows = torch.zeros(3, 1000)
    rows[0] = torch.linspace(-1, 1, 1000)
    rows[1] = rows[0]
    rows[1, -1] = 5.0  # alone: a step that reaches it has four integers for the rest
    even, cut, none = least_error_steps(rows, -8, 7).tolist()
    assert even == pytest.approx(1 / 7.5, rel=0.03)  # half a step over at both ends
    assert 0.6 * 5 / 7 < cut < 0.9 * 5 / 7
    assert none == 1

    def error(step):
        return float(((rows[1] / step).round().clamp(-8, 7) * step - rows[1]).abs().pow(3).sum())

    tried = torch.linspace(0.3, 1, 701) * 5 / 7
    assert error(cut) <= 1.01 * min(error(float(step)) for step in tried)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("target", ["portable", "arm"])
def test_weights_of_4_bits_have_16_levels(toys, tmp_path, target, per_channel):
    model, images = toys.plain(), toys.card().normalise(toys.images(8).images)
    options = {"weights": "int4", "target": target, "per_channel": per_channel}
    made = quantized(model, images, tmp_path, **options)
    proto = made.proto()
    types = {t.name: t.data_type for t in proto.graph.initializer}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for layer in made.graph.layers:
        name = f"{layer.weight}_quantized"
        assert types[name] == onnx.TensorProto.INT4
        integers = torch.tensor(arrays[name].astype("int8"))
        weight = made.graph.constant(layer.weight)
        scale = torch.tensor(arrays[f"{layer.weight}_scale"])
        assert scale.numel() == (len(weight) if per_channel else 1)
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        assert torch.equal(integers, (weight / scale).round().clamp(-8, 7).to(torch.int8))
        assert -8 <= int(integers.min()) < -4
        assert 4 < int(integers.max()) <= 7
    # The activations are of 8 bits.
    kind = onnx.TensorProto.INT8 if target == "arm" else onnx.TensorProto.UINT8
    assert types["images_zero_point"] == kind
    assert "int4, 4 bits" in made.describe()["weights"]


def test_a_transposed_layers_4_bits_have_the_steps_of_its_output_channels(tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2, stride=2), nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4]).view(1, 5, 1, 1))
    images = torch.rand(8, 3, 4, 4)
    made = quantized(model, images, tmp_path, weights="int4", bias_correction=False)
    rounded, weight = made.rounded_weights()["0.weight"], model[0].weight.detach()
    for channel in range(5):
        assert decibels(*_powers(rounded[:, channel], weight[:, channel])) > 14


def test_a_file_of_4_bits_is_half_as_large(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 64, 3), nn.Flatten(1))
    images = torch.rand(4, 3, 6, 6)
    size = {
        weights: len(
            quantized(model, images, tmp_path, weights=weights).proto().SerializeToString()
        )
        for weights in ("int8", "int4")
    }
    assert size["int4"] < 0.56 * size["int8"]


def test_a_channel_of_hardly_any_weight_keeps_its_bias_in_a_file_of_4_bits(toys, tmp_path):
    model, images = toys.plain(), toys.card().normalise(toys.images(8).images)
    with torch.no_grad():
        model.conv1.weight[0] *= 1e-12
        model.conv1.bias[0] = 3.0
    found = outputs(quantized(model, images, tmp_path, weights="int4").proto(), images, exact=True)
    assert decibels(*_powers(found, model(images).detach())) > 12


def test_tensorrt_reads_no_file_of_4_bits():
    with pytest.raises(OptionError, match=r"set it to int8: .* TensorRT does not read"):
        OnnxQuantizer(weights="int4", target="tensorrt")


def saturating():
    """Return a network whose sums of two products of bytes do not fit into 16 bits."""
    model = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-14.0)
        model[3].weight.copy_(torch.sin(torch.arange(3.0 * 128)).view(3, 128))
    return model


def test_the_sums_of_a_portable_file_saturate_nowhere(tmp_path):
    images = torch.rand(40, 16, 4, 4, generator=torch.Generator().manual_seed(0)) / 16 + 0.94
    made = quantized(saturating(), images, tmp_path).proto()
    fast, exact = outputs(made, images), outputs(made, images, exact=True)
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)
    made = quantized(saturating(), images, tmp_path, target="vnni").proto()
    fast, exact = outputs(made, images), outputs(made, images, exact=True)
    here = this_processor()
    if here.machine in {"x86_64", "AMD64"} and here.flags and not here.has_vnni:
        assert float((fast - exact).abs().max()) > 0.1 * float(exact.abs().max())
    elif here.has_vnni or here.is_arm:
        torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)


# Bias correction.


class Awkward(nn.Module):
    """Padding, strides, groups and dilation, with and without biases."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 2), bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.first(x))))
        return self.fc(x.mean((2, 3)))


def test_rounded_weights_leave_the_mean_of_outputs_as_it_was(toys):
    model = toys.fill(Awkward())
    images = toys.card().normalise(toys.images(12).images)
    graph = FloatGraph(exported(model, images.shape[1:]))
    means = MeanInputs(corrected(graph.layers))
    for part in images.split(5):
        for values in values_of(graph.proto, graph.tensors, [part]):
            means.see(values)
    coarse = {
        layer.weight: (graph.constant(layer.weight) * 3).round() / 3 for layer in graph.layers
    }
    shifts = corrections(graph, means.means(), coarse)
    right = {layer.node: layer.output for layer in graph.layers}
    (before,) = values_of(graph.proto, list(right.values()), [images])
    for number, layer in enumerate(graph.layers):
        other = FloatGraph(graph.serialised())
        (weights,) = (t for t in other.proto.graph.initializer if t.name == layer.weight)
        weights.CopyFrom(onnx.numpy_helper.from_array(coarse[layer.weight].numpy(), layer.weight))
        for shifted in (False, True):
            if shifted:
                other.shift_bias(other.layers[number], shifts[layer.node])
            (after,) = values_of(other.proto, [layer.output], [images])
            off = (after[layer.output] - before[layer.output]).transpose(0, 1).flatten(1).mean(1)
            assert (float(off.abs().max()) < 1e-5) == shifted


def test_what_is_corrected_is_nearer_to_float(toys, tmp_path):
    model = toys.fill(Awkward())
    images = toys.card().normalise(toys.images(30).images)
    found = [
        decibels(
            *_powers(
                outputs(quantized(model, images, tmp_path, bias_correction=on).proto(), images),
                model(images).detach(),
            )
        )
        for on in (False, True)
    ]
    assert found[1] > found[0]


def test_biases_that_two_layers_share_are_corrected_apart(toys):
    graph = FloatGraph(exported(toys.plain(), (3, 8, 8)))
    first, second, _ = graph.layers
    graph.proto.graph.node[[n.name for n in graph.proto.graph.node].index(second.node)].input[2] = (
        first.bias
    )
    before = graph.constant(first.bias)
    graph.shift_bias(replace(first), torch.ones(4))
    assert torch.equal(graph.constant(first.bias), before)


# Files.


def test_a_layer_left_in_float_computes_in_float_however_the_file_is_run(toys, tmp_path):
    """ONNX Runtime would make its weights integers, with one scale, when it loads the file."""
    model, images = toys.residual(), toys.card().normalise(toys.images(12).images)
    made = quantized(model, images, tmp_path, bias_correction=False)
    for layer in ("conv1", "conv3", "fc"):
        proto = made.proto((layer,))
        found = outputs(proto, images, exact=True)
        written = outputs(proto, images, as_written=True)
        # But for the rounding of a step of the last layer's integers.
        assert decibels(*_powers(found, written)) > 40
        (tmp_path / "kept.onnx").write_bytes(proto.SerializeToString())
        counts = made.look(tmp_path / "kept.onnx", images).in_float
        assert {"Conv", "FusedConv", "Gemm", "FusedGemm"} & set(counts)
    (tmp_path / "all.onnx").write_bytes(made.proto().SerializeToString())
    look = made.look(tmp_path / "all.onnx", images)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & set(look.in_float)
    assert "ReduceMean" in look.in_float
    assert list(look.noise) == ["conv1", "conv2", "conv3", "fc"]
    assert 20 < min(look.noise.values()) < 60


def test_the_noise_of_a_layer_by_hand():
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 1.0) == pytest.approx(0)
    assert decibels(1.0, 0.0) == 999.0


def test_files_tell_nothing_of_where_they_were_written(toys, tmp_path):
    model, images = toys.residual(), toys.card().normalise(toys.images(8).images)
    plain = exported(model, images.shape[1:])
    written = quantized(model, images, tmp_path).proto().SerializeToString()
    here = str(Path(__file__).parent).encode()
    for content in (plain, written):
        assert here not in content
        assert b"stack_trace" not in content
        assert b".py" not in content


def test_nothing_is_printed_or_logged(toys, tmp_path, capfd, caplog):
    images = toys.card().normalise(toys.images(8).images)
    quantized(toys.residual(), images, tmp_path).proto()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name == "root"] == []


def test_a_network_without_weights_has_nothing_to_quantise(tmp_path):
    with pytest.raises(DreamkitError, match="no layer with weights"):
        quantized(nn.Flatten(), torch.zeros(4, 1, 2, 2), tmp_path)


def test_a_file_that_the_runtime_cannot_read_is_told(toys):
    proto = onnx.load_model_from_string(exported(toys.plain(), (3, 8, 8)))
    proto.opset_import[0].version = 4000
    with pytest.raises(DreamkitError, match=r"ONNX Runtime [\d.]+ cannot load the model"):
        OnnxSession(proto.SerializeToString(), 1, EXAMPLE)


def test_auto_says_what_it_is_for():
    told = OnnxQuantizer(target="auto").note()
    assert told is not None
    assert f"target {this_processor().target}" in told
    assert OnnxQuantizer().note() is None
    small = OnnxQuantizer(weights="int4")
    assert "small, not fast" in (small.note() or "")
    assert (small.suffix, OnnxQuantizer().suffix) == (".int4.onnx", ".int8.onnx")
    warned = OnnxQuantizer(target="vnni").note() is not None
    assert warned == (not this_processor().has_vnni and platform.machine() == "x86_64")
