"""ONNX Runtime as a target of latencies: the layers it times are the layers it is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.latency.onnx_layers import layer_as_onnx, layer_in_integers
from dreamkit.latency.onnx_runtime import OnnxRuntime, network_in_integers
from dreamkit.latency.table import LookUpTable
from dreamkit.latency.table_file import read_table, table_text
from dreamkit.onnx_int8 import joined
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.types import LayerShape

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "strided": nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), bias=False),
    "dilated": nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "linear": nn.Linear(5, 7),
    "without bias": nn.Linear(5, 7, bias=False),
}


def example(layer):
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features)
    return torch.randn(2, layer.in_channels, 9, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_there(name):
    layer = LAYERS[name].eval()
    x = example(layer)
    found = OnnxSession(layer_as_onnx(layer, x), 1, x).run()
    torch.testing.assert_close(found, layer(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_is_the_same_there_for_any_number_of_images(toys):
    model = toys.residual()
    images = toys.card().normalise(toys.images(8).images)
    session = OnnxSession(as_onnx(model, images, any_batch=True), None, images)
    with torch.no_grad():
        torch.testing.assert_close(session.run(), model(images), rtol=1e-4, atol=1e-5)
        few = images[:3]
        torch.testing.assert_close(session.run(few), model(few), rtol=1e-4, atol=1e-5)


def test_timing(toys):
    backend = OnnxRuntime(batch_size=2, threads=1, warmup=1, repeats=5)
    big, small = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(2, 2, 1)
    inputs = [torch.randn(2, 64, 32, 32), torch.randn(2, 2, 4, 4), torch.randn(2, 3, 8, 8)]
    timings = backend.time(list(zip([big, small, toys.two_bn()], inputs, strict=True)))
    assert timings[0].median_ms > 5 * timings[1].median_ms > 0
    assert timings[2].median_ms > 0
    assert backend.describe()["threads"] == "1"
    assert backend.describe()["runtime"].startswith("onnxruntime ")


def test_a_table_is_measured_there():
    table = LookUpTable(OnnxRuntime(threads=1, warmup=0, repeats=3))
    shape = LayerShape("conv", 9, 8, (3, 3), (1, 1), (1, 1), feature_map=(8, 8))
    assert table.predict(shape) > 0
    assert {(s.c_in, s.c_out) for s in table.points} == {(9, 8)}, "between blocks of 4"


# --- in integers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_between_bytes_is_the_same_layer(name):
    layer = LAYERS[name].eval()
    x = example(layer)
    model, given = layer_in_integers(layer, x)
    found = OnnxSession(model, 1, given).run()
    assert given.dtype == found.dtype == torch.uint8
    with torch.no_grad():
        expected = layer(x)
    values = (found.float() - 128) * expected.abs().max() / 127
    if x.dim() == 4:
        assert given.shape == (2, 9, 8, x.shape[1]), "channels last"
        values = values.permute(0, 3, 1, 2)
    # Weights of 7 bits are off by 0.4 % of the largest at the most, bytes by as much.
    torch.testing.assert_close(values, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_between_bytes_is_one_operator(name):
    layer = LAYERS[name].eval()
    operators = [
        node.op_type for node in joined(layer_in_integers(layer, example(layer))[0]).graph.node
    ]
    (one,) = [operator for operator in operators if operator not in ("Transpose", "Identity")]
    assert one == ("QGemm" if isinstance(layer, nn.Linear) else "QLinearConv")


def test_a_layer_of_zeros_is_a_layer():
    layer = nn.Conv2d(2, 3, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    model, given = layer_in_integers(layer, torch.zeros(1, 2, 4, 4))
    assert OnnxSession(model, 1, given).run().unique().tolist() == [128]


def test_a_network_in_integers_stays_the_network(toys):
    model = toys.residual()
    before = toys.state(model)
    images = torch.randn(8, 3, 8, 8)
    made = network_in_integers(model, images)
    toys.assert_same_state(model, before)
    operators = {node.op_type for node in joined(made).graph.node}
    assert "QLinearConv" in operators
    assert not {"Conv", "Gemm", "Relu"} & operators
    with torch.no_grad():
        expected = model(images)
    found = OnnxSession(made, 1, images, exact=True).run()
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_timing_in_integers(toys):
    backend = OnnxRuntime(batch_size=2, threads=1, dtype="int8", warmup=1, repeats=5)
    big, small = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(2, 2)
    inputs = [torch.randn(2, 64, 32, 32), torch.randn(2, 2), torch.zeros(2, 3, 8, 8)]
    timings = backend.time(list(zip([big, small, toys.two_bn()], inputs, strict=True)))
    assert timings[0].median_ms > 5 * timings[1].median_ms > 0
    assert timings[2].median_ms > 0
    assert backend.describe() == {**OnnxRuntime(2, 1).describe(), "dtype": "int8"}


def test_a_table_in_integers_is_none_in_float(tmp_path):
    table = LookUpTable(OnnxRuntime(threads=1, dtype="int8", warmup=0, repeats=3))
    assert table.predict(LayerShape("conv", 16, 32, feature_map=(8, 8))) > 0
    assert {(s.c_in, s.c_out) for s in table.points} == {(16, 32)}
    assert table.predict(LayerShape("conv", 24, 32, feature_map=(8, 8))) > 0
    assert {s.c_in for s in table.points} == {16, 23}, "between blocks of 16"
    path, notes = tmp_path / "t.json", []
    path.write_text(table_text(table))
    assert read_table(path, table.backend).points == table.points
    assert read_table(path, OnnxRuntime(threads=1), note=notes.append).points == {}
    assert "(dtype int8 there, float32 here)" in notes[0]


def test_what_is_timed_in_float_is_told():
    class Norm(nn.Module):
        def forward(self, x):
            return x / x.square().mean(1, keepdim=True).sqrt()

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Norm(), nn.Conv2d(4, 4, 1), nn.ReLU())
    images = torch.zeros(1, 3, 8, 8)
    told = OnnxRuntime(dtype="int8").remark(network, images)
    assert told.startswith("operators that are timed in float")
    assert "ReduceMean (1)" in told
    assert OnnxRuntime().remark(network, images) is None
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten())
    assert OnnxRuntime(dtype="int8").remark(whole, images) is None
