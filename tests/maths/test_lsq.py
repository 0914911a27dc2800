"""Training in integers: gradients by hand, and a file that computes what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.errors import DreamkitError
from dreamkit.onnx_model import OnnxSession, as_onnx
from dreamkit.quantizers.float_graph import FloatGraph
from dreamkit.quantizers.lsq import LearnedStep
from dreamkit.quantizers.onnx_operators import Operator
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.quantizers.signal_to_noise import decibels
from dreamkit.quantizers.simulation import SimulatedNetwork
from dreamkit.types import Quantization, QuantizationStep

# Learned steps, by hand.


def test_values_are_the_nearest_integers_times_the_step():
    step = LearnedStep(torch.tensor(0.5), torch.tensor(0), -2, 2, 0, of_weights=True)
    values = torch.tensor([0.2, 0.3, -0.6, 0.75, -7.0, 1.2])
    # Halves go to the even integer, as they do in ONNX.
    expected = [0.0, 0.5, -0.5, 1.0, -1.0, 1.0]
    assert step(values).tolist() == pytest.approx(expected)
    assert step.integers(values).tolist() == [0, 1, -1, 2, -2, 2]


def test_a_zero_point_moves_the_limits():
    step = LearnedStep(torch.tensor(1.0), torch.tensor(10), 0, 255, 1, of_weights=False)
    assert step(torch.tensor([[-20.0, -3.4, 300.0]])).tolist() == [[-10.0, -3.0, 245.0]]
    assert step.integers(torch.tensor([[-20.0, -3.4, 300.0]])).tolist() == [[0, 7, 255]]


def test_gradients_are_those_of_the_paper():
    """Eq. 3: -v/s + round(v/s) within the limits, -Qn and Qp outside; eq. 5: 1 within, else 0."""
    step = LearnedStep(torch.tensor(0.5), torch.tensor(0), -2, 3, 0, of_weights=True)
    values = torch.tensor([0.1, -0.4, 5.0, -5.0], requires_grad=True)
    step(values).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert values.grad.tolist() == [1.0, 10.0, 0.0, 0.0]
    by_hand = 1 * (0 - 0.2) + 10 * (-1 + 0.8) + 100 * 3 + 1000 * -2
    assert float(step.step.grad) == pytest.approx(by_hand / (4 * 3) ** 0.5)


def test_each_channel_has_a_step_of_its_own():
    step = LearnedStep(torch.tensor([0.5, 2.0]), torch.zeros(2), -2, 2, 0, of_weights=True)
    values = torch.tensor([[0.3, 9.0], [3.1, 0.4]])
    out = step(values)
    assert out.tolist() == [[0.5, 1.0], [4.0, 0.0]]
    out.sum().backward()
    share = (2 * 2) ** -0.5
    right = [share * (1 - 0.6 + 2), share * (2 - 3.1 / 2 - 0.2)]
    assert step.step.grad.tolist() == pytest.approx(right)


def test_activations_count_the_values_of_one_image():
    found = []
    for images in (1, 4):
        step = LearnedStep(torch.tensor(0.5), torch.tensor(0), 0, 255, 1, of_weights=False)
        step(torch.full((images, 2, 3), 0.3)).mean().backward()
        found.append(float(step.step.grad))
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx((1 - 0.6) / (6 * 255) ** 0.5)


def test_a_step_that_falls_below_zero_is_a_very_small_one():
    step = LearnedStep(torch.tensor(-1.0), torch.tensor(0), -2, 2, 0, of_weights=True)
    assert bool(step(torch.ones(3)).isfinite().all())


# Operators.


class Everything(nn.Module):
    """All operators that are known, but for those of other files."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=(2, 1), bias=False)
        self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.line = nn.Conv1d(6, 4, 3)
        self.fc = nn.Linear(4 * 6, 5)

    def forward(self, x):
        x = F.leaky_relu(self.conv(F.pad(x, (1, 0, 0, 2), value=0.5)), 0.2)
        x = F.hardswish(x) + F.hardsigmoid(x) * x.sigmoid() - x / 3
        x = torch.cat([x[:, 1:4], x.clamp(-0.5, 0.7)[:, ::2]], 1)
        x = F.max_pool2d(F.relu6(self.dilated(x)), 3, stride=2, padding=1, ceil_mode=True)
        x = F.avg_pool2d(x, 2, stride=1, padding=1) * F.adaptive_avg_pool2d(x, 1)
        x = self.line(x.flatten(2)[..., :8]).transpose(1, 2).flatten(1)
        return self.fc(x)


def test_operators_do_what_onnx_says(toys):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model, images = toys.fill(Everything()), torch.randn(4, 3, 9, 9)
    graph = FloatGraph(as_onnx(model, images, any_batch=True))
    network = SimulatedNetwork(graph.proto, {}, (-64, 64), Quantization)
    torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-5)
    network(images).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in network.parameters())
    assert len(list(network.parameters())) == 7


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Operator("n", "Erf", ("x",), "y"), r"no gradient of the operator Erf \(n\)"),
        (
            Operator("n", "MaxPool", ("x",), "y", {"auto_pad": b"SAME_UPPER"}),
            "padding by the input's size",
        ),
        (
            Operator("n", "AveragePool", ("x",), "y", {"pads": [0, 0, 1, 1]}),
            "not the same on both sides",
        ),
    ],
)
def test_what_is_not_known_is_said(operator, message):
    with pytest.raises(DreamkitError, match=message):
        operator.run(torch.zeros(1, 1, 4, 4))


# Files.


@pytest.fixture(scope="module")
def residual():
    """The bytes of a network in float: exporting takes seconds."""
    return {}


def quantized(toys, residual, images, folder, **options):
    model = toys.residual()
    if not residual:
        residual["file"] = as_onnx(model, images, any_batch=True)
    step = QuantizationStep(
        model=model,
        batches=lambda: iter(images.split(5)),
        folder=folder,
        note=lambda text: None,
        advance=lambda share: None,
    )
    return OnnxQuantizer(**options).calibrate_graph(FloatGraph(residual["file"]), step)


def outputs(quantization, images, folder, keep_float=()):
    path: Path = folder / "file.onnx"
    quantization.write(path, keep_float)
    return OnnxSession(path, 1, torch.zeros(()), exact=True, as_written=True).run(images)


def noise(found, right):
    return decibels(float(right.square().sum()), float((found - right).square().sum()))


OPTIONS = [
    ({}, ()),
    ({}, ("conv2",)),
    ({"per_channel": False}, ()),
    ({"target": "vnni", "equalise": True}, ()),
    ({"target": "arm"}, ("conv1", "fc")),
    ({"target": "tensorrt"}, ()),
    ({"weights": "int4"}, ()),
    ({"weights": "int4", "per_channel": False, "target": "arm"}, ("conv2",)),
]


@pytest.mark.parametrize(("options", "kept"), OPTIONS)
def test_the_file_computes_what_was_trained(toys, residual, tmp_path, options, kept):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="needs the extra onnx")
    images = toys.card().normalise(toys.images(40).images)
    made = quantized(toys, residual, images, tmp_path, **options)
    network = made.simulated(kept)
    before = outputs(made, images, tmp_path, kept)
    assert noise(network(images).detach(), before) > 40
    assert noise(outputs(network.trained(), images, tmp_path), before) > 60
    wanted = before + torch.tensor([0.3, 0.0, -0.3]) * before.std()  # other classes for some
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(network(images), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in network.parameters())
    now, trained = network(images).detach(), network.trained()
    assert noise(now, before) < 30
    found = outputs(trained, images, tmp_path)
    assert noise(found, now) > 35
    assert float((found.argmax(1) == now.argmax(1)).float().mean()) >= 0.95
    told = trained.describe()
    assert told["trained"] == "LSQ"
    assert told["ranges"].keys() == made.describe()["ranges"].keys()
    assert told["ranges"] != made.describe()["ranges"]


def test_what_was_trained_has_its_layers_settled(toys, residual, tmp_path):
    images = toys.card().normalise(toys.images(8).images)
    trained = quantized(toys, residual, images, tmp_path).simulated().trained()
    assert trained.layers == ()
    with pytest.raises(DreamkitError, match="has its layers settled"):
        trained.write(tmp_path / "file.onnx", ("conv1",))
    trained.write_float(tmp_path / "float.onnx")
    found = OnnxSession(tmp_path / "float.onnx", 1, torch.zeros(())).run(images)
    torch.testing.assert_close(found, toys.residual()(images).detach(), rtol=1e-4, atol=1e-5)


def test_operators_of_several_outputs_are_refused(toys, residual, tmp_path):
    images = toys.card().normalise(toys.images(8).images)
    made = quantized(toys, residual, images, tmp_path)
    file = made.proto()
    file.graph.node[0].output.append("second")
    with pytest.raises(DreamkitError, match="does not know operators of several outputs"):
        SimulatedNetwork(file, {}, (-64, 64), made)
