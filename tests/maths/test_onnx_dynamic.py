"""Dynamic INT8: linear layers in integers, with ranges taken as images pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.applications.quantize import Quantize
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.onnx_model import OnnxSession
from dreamkit.quantizers.onnx_dynamic import OnnxDynamicQuantizer
from dreamkit.quantizers.targets import this_processor
from dreamkit.stages.quantization_aware import QuantizationAwareTraining
from dreamkit.types import QuantizationStep

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

SIZE = (2, 4, 4)


class Tokens(nn.Module):
    """A convolution, and linear layers over positions; their products are of activations too."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 2, 2)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.second(self.first(tokens).relu())
        mixed = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return self.head(mixed.mean(1))


def images(count):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.fixture
def quantized(tmp_path):
    def make(model, **options):
        step = QuantizationStep(
            model=model,
            batches=lambda: iter([images(2)]),
            folder=tmp_path,
            note=lambda text: None,
            advance=lambda share: None,
        )
        return OnnxDynamicQuantizer(**options).calibrate(step)

    return make


def integers(path):
    """Return the weights that are integers, by name."""
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {
        name: values for name, values in found.items() if values.dtype == "int8" and values.ndim
    }


@pytest.mark.parametrize(("target", "largest"), [("portable", 64), ("vnni", 127)])
def test_linear_layers_are_integers_of_as_many_bits_and_nothing_else(
    quantized, model, tmp_path, target, largest
):
    made = quantized(model, target=target)
    assert made.layers[-1] == "head"
    assert len(made.layers) == 3
    made.write(tmp_path / "made.onnx")
    weights = {n: w for n, w in integers(tmp_path / "made.onnx").items() if w.ndim == 2}
    assert sorted(w.size for w in weights.values()) == [24, 128, 128]
    assert all(abs(w.astype(int)).max() == largest for w in weights.values())
    kinds = [node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 3
    assert kinds.count("MatMul") == 2  # of activations
    assert kinds.count("Conv") == 1
    assert f"{7 if target == 'portable' else 8} bits" in made.describe()["weights"]


def test_the_file_does_what_float_does_for_any_number_of_images(quantized, model, tmp_path):
    made = quantized(model)
    made.write(tmp_path / "made.onnx")
    made.write_float(tmp_path / "float.onnx")
    quantizer = OnnxDynamicQuantizer()
    for count in (1, 7):
        with torch.no_grad():
            right = model(images(count))
        found = quantizer.load(tmp_path / "made.onnx", 1, exact=True)(images(count))
        error = (found - right).square().mean() / right.square().mean()
        assert 0 < error < 1e-3
        in_float = quantizer.load(tmp_path / "float.onnx", 1)(images(count))
        assert torch.allclose(in_float, right, atol=1e-5)


def test_layers_that_stay_in_float_make_no_noise(quantized, model, tmp_path):
    made = quantized(model)
    made.write(tmp_path / "none.onnx", made.layers)
    assert integers(tmp_path / "none.onnx") == {}
    made.write(tmp_path / "some.onnx", made.layers[:1])
    made.write(tmp_path / "all.onnx")
    some = made.look(tmp_path / "some.onnx", images(4))
    whole = made.look(tmp_path / "all.onnx", images(4))
    first = made.layers[0]
    assert some.noise[first] > 100 > whole.noise[first]
    assert whole.noise["patches"] > 100  # the convolution
    assert whole.in_float["Conv"] == 1
    assert sum(kind in whole.in_float for kind in ("MatMulInteger", "DynamicQuantizeMatMul")) == 0
    assert sum(v for k, v in some.in_float.items() if "MatMul" in k or k == "Gemm") == 3
    assert sum(v for k, v in whole.in_float.items() if "MatMul" in k or k == "Gemm") == 2


def test_the_float_graph_stays_as_it_is(quantized, model, tmp_path):
    made = quantized(model)
    before = made.graph.serialised()
    made.write(tmp_path / "made.onnx")
    assert made.graph.serialised() == before
    session = OnnxSession(before, 1, torch.zeros(()))
    with torch.no_grad():
        assert torch.allclose(session.run(images(3)), model(images(3)), atol=1e-5)


def test_a_network_without_linear_layers_is_refused(quantized):
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(DreamkitError, match=r"no linear layer; \{name: onnxruntime\}") as caught:
        quantized(plain)
    assert caught.value.path == ("quantizer",)


def test_training_in_integers_is_refused_where_nothing_is_calibrated():
    assert not OnnxDynamicQuantizer().calibrates
    with pytest.raises(OptionError, match="set it to null") as caught:
        Quantize(quantizer=OnnxDynamicQuantizer(), training=QuantizationAwareTraining())
    assert caught.value.option == "training"


def test_what_auto_is_on_this_machine_is_said():
    assert OnnxDynamicQuantizer().note() is None
    assert this_processor().target in (OnnxDynamicQuantizer(target="auto").note() or "")
