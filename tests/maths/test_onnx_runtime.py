"""ONNX Runtime as a target of latencies: the layers it times are the layers it is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.latency.onnx_runtime import OnnxRuntime, layer_as_onnx
from dreamkit.latency.table import LookUpTable
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
